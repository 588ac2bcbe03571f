"""A recipe, killed at twenty random points and once out of disk, ends where the undisturbed one does: bit for bit."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

NUM_KILLS = 20


def everything(teacher: Path, text: Path) -> dict:
    """A recipe with every kind of stage that makes something, small enough for seconds."""
    small = {"tokens_per_step": 256, "sequence_length": 256}
    traces = {"data": {"source": "traces", "stage": "traces"}}
    train = {**small, "learning_rate": 1e-3, "save_every": 1}
    return {
        "name": "everything",
        "teacher": str(teacher),
        "data": {"source": "world", "levels": [1]},
        "stages": [
            {"kind": "traces", "num_prompts": 6, "max_new_tokens": 8, "verifier": "none", "batch_size": 2},
            {"kind": "rank", "name": "loo", "method": "loo", "heldout_rows": 1, **small},
            {
                "kind": "schedule",
                "name": "h",
                "layers": [1, 2],
                "rank": {"steps": 2, "heldout_rows": 1, **small},
                "fit": {"steps": 2, **train},
                "distill": {"steps": 3, **train, "stop": {"every": 1, "heldout_rows": 1, "below": 1e-9}},
                "evaluate": {"level": 1, "problems_per_task": 1},
            },
            {
                "kind": "on_policy",
                "model": "h",
                "steps": 2,
                "prompts_per_step": 2,
                "max_new_tokens": 8,
                "save_every": 1,
            },
            {"kind": "sft", "model": "h", "steps": 2, **train, **traces, "teacher_control": True},
            {"kind": "merge", "sources": ["sft", "on_policy"]},
            {"kind": "text", "model": "merge", "text": str(text), "max_tokens": 300, "sequence_length": 64},
            {"kind": "report"},
        ],
    }


def results(run: Path) -> dict[str, object]:
    """What a run made, without times: weights, traces, losses, rankings, judgements."""
    found: dict[str, object] = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file() and not path.parent.name.startswith(".")):
        name = str(file.relative_to(run))
        if file.suffix in (".safetensors", ".parquet"):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.name == "metrics.jsonl":
            records = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
        elif file.name == "ranking.json":
            ranking = json.loads(file.read_text())
            found[name] = {k: ranking[k] for k in ("order", "scores", "before")}
        elif file.name == "evaluation.json":
            found[name] = {k: v for k, v in json.loads(file.read_text()).items() if "seconds" not in k}
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_twenty_times_ends_where_the_undisturbed_one_does(tiny_teacher, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("red box 914, gold jar 628. " * 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(everything(tiny_teacher, text)))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, script, recipe, undisturbed, killed, NUM_KILLS, 7]
    environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert sum(told["kills"].values()) == NUM_KILLS
    assert len(told["kills"]) >= 4, f"kills must fall into several stages: {told}"
    assert told["exit_on_full_disk"] == 3, f"a full disk stops the run: {told}"
    assert told["kept"] >= 2, f"and keeps what was finished: {told}"
    expected = results(undisturbed)
    assert len([name for name in expected if name.endswith(".safetensors")]) >= 8
    for run in [killed, *tmp_path.glob("killed-*")]:
        assert results(run) == expected, run.name
        assert not list(run.glob(".*")), "no partial folder may be left"

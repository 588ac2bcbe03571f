"""A recipe runs to its report, skips what stands, notices damage, and survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hybridize.pipeline.progress import Reporter
from hybridize.pipeline.runner import run_recipe
from hybridize.spec.recipe import parse_recipe

QUIET = Reporter(quiet=True)


def weights(run: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(run / "distill" / "model.safetensors")


def test_run_makes_every_artifact_and_a_loadable_model(tiny_recipe):
    artifacts = run_recipe(parse_recipe(tiny_recipe), QUIET)
    run = Path(tiny_recipe["output"])
    assert list(artifacts) == ["rank", "convert", "distill", "judge-teacher", "judge", "report"]
    assert (run / "report" / "report.html").stat().st_size > 10_000
    assert not list(run.glob(".*")), "no partial folder may be left"
    assert not (run / "distill" / "checkpoints").exists()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hybridize  # noqa: F401 - registers the hybrid with the Auto classes

    model = AutoModelForCausalLM.from_pretrained(run / "distill")
    assert model.config.layout.replaced == tuple(artifacts["convert"].metrics["layers"])
    assert AutoTokenizer.from_pretrained(run / "distill").chat_template


def test_run_again_skips_all_and_a_changed_stage_reruns_only_what_depends_on_it(tiny_recipe):
    first = run_recipe(parse_recipe(tiny_recipe), QUIET)
    again = run_recipe(parse_recipe(tiny_recipe), QUIET)
    assert {n: a.manifest for n, a in first.items()} == {n: a.manifest for n, a in again.items()}
    tiny_recipe["stages"][2]["learning_rate"] = 5e-4
    changed = run_recipe(parse_recipe(tiny_recipe), QUIET)
    same = {
        n
        for n in first
        if first[n].manifest["created"] == changed[n].manifest["created"]
        and first[n].manifest["key"] == changed[n].manifest["key"]
    }
    assert same == {"rank", "convert", "judge-teacher"}


def test_run_names_a_truncated_artifact(tiny_recipe):
    run_recipe(parse_recipe(tiny_recipe), QUIET)
    file = Path(tiny_recipe["output"]) / "convert" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"convert/model\.safetensors: was truncated or edited.*remove"):
        run_recipe(parse_recipe(tiny_recipe), QUIET)


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_where_the_undisturbed_one_does(tiny_recipe, tmp_path):
    undisturbed = dict(tiny_recipe, output=str(tmp_path / "undisturbed"))
    run_recipe(parse_recipe(undisturbed), QUIET)
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe))
    run = Path(tiny_recipe["output"])
    marks = [  # kill as soon as each of these is there: within ranking, within distillation, after it
        ".rank.partial/layers/layer-1.json",
        ".distill.partial/checkpoints/checkpoint-2",
        ".judge.partial",
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    for mark in marks:
        command = [sys.executable, "-c", "from hybridize.cli import main; main()", "run", str(recipe)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (run / mark).exists() and process.poll() is None:
            assert time.monotonic() < deadline, f"{mark} never appeared"
            time.sleep(0.005)
        assert process.poll() is None, (mark, process.stderr.read().decode())
        process.send_signal(signal.SIGKILL)
        process.communicate()
    artifacts = run_recipe(parse_recipe(tiny_recipe), QUIET)
    assert artifacts["distill"].metrics["steps"] == 6
    killed, whole = weights(run), weights(tmp_path / "undisturbed")
    assert killed.keys() == whole.keys()
    assert all((killed[name] == whole[name]).all() for name in whole)
    metrics = (run / "distill" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r["stages"][1].update(num_layers=5),
            r"recipe\.stages\[1\]\.num_layers: 5 is out of range.*1\.\.4",
        ),
        (lambda r: r.update(teacher="/nowhere/at-all"), r"teacher: there is no folder /nowhere/at-all"),
        (
            lambda r: r.update(data={"source": "file", "path": "/nowhere.jsonl"}),
            r"data\.path: there is no file",
        ),
    ],
)
def test_run_refuses_what_does_not_fit_before_doing_anything(tiny_recipe, change, message):
    change(tiny_recipe)
    with pytest.raises(ValueError, match=message):
        run_recipe(parse_recipe(tiny_recipe), QUIET)
    assert not (Path(tiny_recipe["output"]) / "rank").exists()


def test_run_refuses_an_explicit_layer_out_of_range(tiny_recipe):
    tiny_recipe["stages"][1] = {"kind": "convert", "layers": [1, 24]}
    with pytest.raises(ValueError, match=r"recipe\.stages\[1\]\.layers\[1\]: the teacher has no layer 24.*0\.\.3"):
        run_recipe(parse_recipe(tiny_recipe), QUIET)

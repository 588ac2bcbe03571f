"""Tokens per second in vLLM, for a teacher and its hybrids, with random weights: speed does not depend on them.

A crowd of sequences, as many as the cache holds when all are complete, starts together. By default a scenario is not
run in full, which takes many minutes a model, but sampled: decode steps are timed at its start, middle and end, with
caches that count as filled (`hybridize.bench.filled_cache`), prompts by themselves, and the scenario's time is summed
up from that. Records carry the points that were measured. Models run one after the other, each in a process of its own
(`hybridize.bench.serving_job`); nothing of vLLM is imported here.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybridize.bench.prediction import GPUS, Gpu, ServedShape, predict
from hybridize.bench.scenarios import TEACHER, Scenario
from hybridize.bench.serving_job import SHORTEST_SPAN
from hybridize.bench.serving_records import read_records
from hybridize.spec.layout import LayoutSpec

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of a measuring process, where the user's environment says nothing else."""

_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine must be in the measuring process, where its steps are seen."""


@dataclass(frozen=True)
class ServedModel:
    """A model to measure.

    Attributes:
        name: in records.
        word: its layout, one letter per layer.
        config: the teacher's.
        shape: its sizes.
        layout: its mixers, where they are not what the letters stand for by default.
    """

    name: str
    word: str
    config: Mapping[str, Any]
    shape: ServedShape
    layout: LayoutSpec | None = None


def measure_serving(
    models: Iterable[ServedModel],
    scenarios: Sequence[Scenario],
    records_file: Path,
    *,
    only: Collection[str] | None = None,
    whole: bool = False,
    repeats: int = 3,
    steps: int = 32,
    utilization: float = 0.9,
    max_sequences: int | None = None,
    state_dtype: str = "float32",
    step_tokens: int | None = None,
    timeout_seconds: float = 1800.0,
    on_progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure models in vLLM, each in a process of its own; what has its record already is not measured again.

    Args:
        models: to be measured, in their order.
        scenarios: what each is asked.
        records_file: JSON lines, one record per model and scenario, written as they are made and read when the call
            is repeated. Beside it, what each process has said, as a log.
        only: names of those that are measured now; the others are those that have their record. By default all.
        whole: run scenarios in full.
        repeats: measurements of each point, or of each scenario in full.
        steps: decode steps of each measurement at a point.
        utilization: share of the GPU's memory that vLLM takes.
        max_sequences: no crowd is larger; by default as many as the memory holds, and 8 on a CPU.
        state_dtype: in which the recurrences' states are kept.
        step_tokens: the most tokens of a step, vLLM's `max_num_batched_tokens`. Memory is kept free for them, so fewer
            leave room for more sequences. By default vLLM's own for offline use, on a large GPU 16384; its server
            takes 8192.
        timeout_seconds: after which a model is given up.
        on_progress: called with a line when a model starts, ends or fails.

    Returns:
        The records of these models and scenarios, of earlier calls too. A model that failed has one with `error`.
        Otherwise: `model`, `layout`, `scenario`, `method` (`sampled` or `whole`), `sequences`, `tokens_per_second`
        (median; and `..._repeats`), `step_ms` (a decode step, the scenario's mean), `floor_ms` (weights, keys and
        values read once, states read and written once, at the bandwidth of a copy), `points` or `seconds` (what was
        timed), `kv_groups`, `num_blocks`, `capacity_tokens`, `copy_gb_per_s`, `model_runner` (vLLM's, 1 or 2; 0.26
        takes 1 for hybrids and 2 for most teachers), `async_scheduling`, `step_tokens`, `asked` (the settings, without
        which a record is not taken for another's), versions, and on a known GPU `predicted`.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an option is out of range.
    """
    counts = {"repeats": repeats, "steps": steps, "max_sequences": max_sequences, "step_tokens": step_tokens}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is out of range; use at least 1")
    needed = SHORTEST_SPAN + repeats
    for scenario in () if whole else scenarios:
        if scenario.new_tokens < needed:
            raise ValueError(
                f"scenario: {scenario} has {scenario.new_tokens} new tokens, of which steps cannot be sampled; use at "
                f"least {needed}, or --whole"
            )
    if not _has_vllm():
        raise ImportError("bench serve: vllm is not installed; pip install 'hybridize[serve]'")
    tell = on_progress or (lambda _: None)
    method = "whole" if whole else "sampled"
    for note in read_records(records_file)[1]:
        tell(note)
    records = []
    for model in models:
        asked: dict[str, Any] = {
            "utilization": utilization,
            "max_sequences": max_sequences,
            "state_dtype": state_dtype,
            "step_tokens": step_tokens,
            "weight_bytes": model.shape.weight_bytes,
            "state_bytes": sum(model.shape.states),
        }
        if any(model.shape.windows):
            asked["windows"] = list(model.shape.windows)
        done = read_records(records_file)[0]
        missing = [s for s in scenarios if not _find(done, model, s, method, asked)]
        if only is not None and model.name not in only:
            missing = []
        failed = None
        if missing:
            tell(f"{model.name}: {', '.join(map(str, missing))}")
            settings = {
                "name": model.name,
                "word": model.word,
                "vocab_size": model.config["vocab_size"],
                "shape": asdict(model.shape),
                "scenarios": [[s.prompt_tokens, s.new_tokens] for s in missing],
                "records": str(records_file.resolve()),
                "whole": whole,
                "repeats": repeats,
                "steps": steps,
                "utilization": utilization,
                "max_sequences": max_sequences,
                "state_dtype": state_dtype,
                "step_tokens": step_tokens,
                "asked": asked,
            }
            records_file.parent.mkdir(parents=True, exist_ok=True)
            failed = _run(settings, model, records_file.with_suffix(f".{model.name}.log"), timeout_seconds)
            tell(f"{model.name}: {failed or 'done'}")
        done = read_records(records_file)[0]
        found = [_find(done, model, scenario, method, asked) for scenario in scenarios]
        records += [record | _prediction(record, model.shape) for record in found if record]
        if failed:
            records.append({"model": model.name, "layout": model.word, "error": failed})
    return records


def serving_table(records: Iterable[Mapping[str, Any]]) -> str:
    """Show the records as Markdown tables, one per scenario, and the models that failed."""
    measured = [record for record in records if "error" not in record]
    header = (
        "| model | KV groups | sequences | cache, tokens | ms a step | floor | step / floor | tokens/s | x teacher |"
    )
    parts = []
    for scenario in dict.fromkeys(record["scenario"] for record in measured):
        rows = [record for record in measured if record["scenario"] == scenario]
        teacher = next((row["tokens_per_second"] for row in rows if row["model"] == TEACHER), None)
        lines = [f"{scenario} tokens, {rows[0]['method']}, {rows[0]['device']}\n", header, "|---" * 9 + "|"]
        for row in rows:
            cells = [
                row["model"],
                str(row["kv_groups"]),
                str(row["sequences"]),
                f"{row['capacity_tokens']:,}",
                f"{row['step_ms']:.3g}",
                f"{row['floor_ms']:.3g}",
                f"{row['step_ms'] / row['floor_ms']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tokens_per_second'] / teacher:.2f}" if teacher else "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    failures = [f"{record['model']}: {record['error']}" for record in records if "error" in record]
    return "\n".join(parts + failures)


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _run(settings: dict[str, Any], model: ServedModel, log: Path, timeout: float) -> str | None:
    """Measure one model in a process of its own, its output to `log`; None, or why it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        job = Path(scratch, "job.json")
        make_served_config(model, folder, max(prompt + new for prompt, new in settings["scenarios"]) + 1)
        job.write_text(json.dumps(settings | {"folder": str(folder)}))
        command = [sys.executable, "-m", "hybridize.bench.serving_job", str(job)]
        with log.open("w") as stream:
            try:
                done = subprocess.run(
                    command,
                    env=_ENVIRONMENT | os.environ | _IN_PROCESS,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=timeout,
                )
            except subprocess.TimeoutExpired:
                return f"not ready within {timeout:g} s; {log} says how far it got"
    return None if done.returncode == 0 else f"{_reason(log.read_text(), done.returncode)} (all of it in {log})"


def _reason(text: str, code: int) -> str:
    """The line of a failed process's output that says why: the last one that names an error."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"(\w+\.)*\w+(Error|Exception): ", line)]
    return lines[-1][:500] if lines else f"ended with code {code}"


def make_served_config(model: ServedModel, folder: Path, num_tokens: int = 0) -> None:
    """Write the folder of a model without weights: its config alone.

    Args:
        model: to be served.
        folder: to be made.
        num_tokens: of a sequence. A model that was made for shorter ones is served nonetheless: speed does not depend
            on it.
    """
    from transformers import AutoConfig

    folder.mkdir(parents=True)
    fields = dict(model.config)
    if fields.get("max_position_embeddings", num_tokens) < num_tokens:
        fields["max_position_embeddings"] = num_tokens
    (folder / "config.json").write_text(json.dumps(fields))
    if set(model.word) == {"a"}:
        return
    from hybridize.models import geometry_of
    from hybridize.models.surgery import hybrid_config_of

    config = AutoConfig.from_pretrained(folder)
    written = model.layout or LayoutSpec.read(model.word, place=f"--layout {model.name}")
    layout = written.resolve(geometry_of(config))
    hybrid_config_of(config, layout).save_pretrained(folder)


def _prediction(record: Mapping[str, Any], shape: ServedShape) -> dict[str, Any]:
    """What was to be expected of a model on the GPU it was measured on; nothing where that is not known."""
    known = next((gpu for name, gpu in GPUS.items() if name in record["device"].lower()), None)
    if known is None:
        return {}
    step_tokens = record.get("step_tokens", known.step_tokens)
    gpu = Gpu(record["memory_bytes"], 1e9 * record["copy_gb_per_s"], known.flops, step_tokens)
    scenario = Scenario(record["prompt_tokens"], record["new_tokens"])
    return {"predicted": asdict(predict(shape, gpu, scenario, utilization=record["utilization"]))}


def _find(
    records: Sequence[dict[str, Any]], model: ServedModel, scenario: Scenario, method: str, asked: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The record of a model in a scenario under the same settings, the newest one; None if there is none."""
    keys = ("model", "layout", "prompt_tokens", "new_tokens", "method", "asked")
    wanted = (model.name, model.word, scenario.prompt_tokens, scenario.new_tokens, method, dict(asked))
    return next((record for record in reversed(records) if tuple(record.get(key) for key in keys) == wanted), None)

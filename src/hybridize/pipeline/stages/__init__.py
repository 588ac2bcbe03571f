"""One function per kind of stage: what it does, given a folder to fill. Each meets the others through files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridize.pipeline.job import Job
from hybridize.pipeline.stages.judging import (
    EVALUATION_FILE,
    run_evaluate,
    run_harness,
    run_text,
    run_throughput,
)
from hybridize.pipeline.stages.making import PLAN_FILE, run_convert, run_merge, run_traces
from hybridize.pipeline.stages.ranking import RANKING_FILE, run_rank
from hybridize.pipeline.stages.searching import SEARCH_FILE, run_search
from hybridize.pipeline.stages.training import METRICS_FILE, run_distill, run_fit, run_on_policy, run_sft
from hybridize.spec.stages import (
    DataStage,
    EvaluateStage,
    HarnessStage,
    RankStage,
    StageSpec,
    TextStage,
    TracesStage,
)

RUNNERS: dict[str, Callable[[Any, Job, Path], dict[str, Any]]] = {
    "traces": run_traces,
    "rank": run_rank,
    "search": run_search,
    "convert": run_convert,
    "fit": run_fit,
    "distill": run_distill,
    "sft": run_sft,
    "on_policy": run_on_policy,
    "merge": run_merge,
    "evaluate": run_evaluate,
    "harness": run_harness,
    "text": run_text,
    "throughput": run_throughput,
}

_CHECKPOINTS = ("checkpoints",)

SCRATCH: dict[str, tuple[str, ...]] = {
    "traces": ("parts",),
    "rank": ("layers",),
    "fit": _CHECKPOINTS,
    "distill": _CHECKPOINTS,
    "sft": _CHECKPOINTS,
    "on_policy": _CHECKPOINTS,
}
"""What a kind of stage keeps only to resume from."""

_NOT_IN_KEY = {"name", "label", "control", "save_every", "batch_size", "rows_per_batch", "gradient_checkpointing"}
"""What may change without a stage being done anew: one that ran out of memory goes on in smaller batches."""


_ADDED_LATER: dict[str, Any] = {"search": None, "levels": {}}
"""Fields that stages got after results were there, with the value that says what was said without them: then they are
left out of the key, so that those results stand."""


def spec_for_key(stage: StageSpec) -> dict[str, Any]:
    """A stage's spec without what does not change its result, but perhaps by rounding."""
    kept = _NOT_IN_KEY - {"batch_size"} if getattr(stage, "kind", "") in ("throughput", "traces") else _NOT_IN_KEY
    facts = stage.model_dump(mode="json", exclude=kept | {"data", *files_of(stage)})
    return {name: value for name, value in facts.items() if name not in _ADDED_LATER or value != _ADDED_LATER[name]}


def reads_data(stage: StageSpec) -> bool:
    """Whether a stage's result depends on the recipe's data, or on that of its own."""
    return isinstance(stage, DataStage)


def judges_in_world(stage: StageSpec) -> bool:
    """Whether a stage's result depends on the problems that the reasoning world draws, whatever its data."""
    return isinstance(stage, EvaluateStage) or (isinstance(stage, RankStage) and stage.score == "world")


def files_of(stage: StageSpec) -> dict[str, str]:
    """The files and folders that a stage reads beside models and data, by the field that names them."""
    match stage:
        case RankStage(scores=str(path)):
            return {"scores": path}
        case TextStage():
            return {"text": stage.text}
        case HarnessStage(benchmarks=str(path)):
            return {"benchmarks": path}
        case TracesStage() if ":" in stage.verifier:
            return {"verifier": stage.verifier.rpartition(":")[0]}
        case _:
            return {}


__all__ = [
    "EVALUATION_FILE",
    "METRICS_FILE",
    "PLAN_FILE",
    "RANKING_FILE",
    "RUNNERS",
    "SCRATCH",
    "SEARCH_FILE",
    "Job",
    "files_of",
    "judges_in_world",
    "reads_data",
    "spec_for_key",
]

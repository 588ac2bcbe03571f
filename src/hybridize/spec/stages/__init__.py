"""What a recipe can do, one spec per kind of stage. Defaults are the paper's (arXiv 2511.02651) where it has one."""

from typing import Annotated

from pydantic import Field

from hybridize.spec.stages.base import TEACHER, DataStage, Divergence, Init, MixedStage, StageSpec, TrainStage
from hybridize.spec.stages.convert import ConvertStage
from hybridize.spec.stages.evaluate import (
    EvaluateStage,
    HarnessStage,
    JudgingStage,
    ReportStage,
    TextStage,
    ThroughputStage,
)
from hybridize.spec.stages.merge import MergeStage
from hybridize.spec.stages.rank import RankMethod, RankStage
from hybridize.spec.stages.schedule import ScheduleStage, distilled_name
from hybridize.spec.stages.search import SearchStage
from hybridize.spec.stages.traces import TracesStage
from hybridize.spec.stages.train import DistillStage, FitStage, OnPolicyStage, SftStage, StopSpec, control_name

AnyStage = Annotated[
    TracesStage
    | RankStage
    | SearchStage
    | ConvertStage
    | FitStage
    | DistillStage
    | SftStage
    | OnPolicyStage
    | MergeStage
    | ScheduleStage
    | EvaluateStage
    | HarnessStage
    | TextStage
    | ThroughputStage
    | ReportStage,
    Field(discriminator="kind"),
]

STAGE_KINDS: dict[str, type[StageSpec]] = {
    "traces": TracesStage,
    "rank": RankStage,
    "search": SearchStage,
    "convert": ConvertStage,
    "fit": FitStage,
    "distill": DistillStage,
    "sft": SftStage,
    "on_policy": OnPolicyStage,
    "merge": MergeStage,
    "schedule": ScheduleStage,
    "evaluate": EvaluateStage,
    "harness": HarnessStage,
    "text": TextStage,
    "throughput": ThroughputStage,
    "report": ReportStage,
}

MODEL_KINDS = ("convert", "fit", "distill", "sft", "on_policy", "merge", "schedule")
"""Kinds of stages that make a model."""

__all__ = [
    "MODEL_KINDS",
    "STAGE_KINDS",
    "TEACHER",
    "AnyStage",
    "ConvertStage",
    "DataStage",
    "DistillStage",
    "Divergence",
    "EvaluateStage",
    "FitStage",
    "HarnessStage",
    "Init",
    "JudgingStage",
    "MergeStage",
    "MixedStage",
    "OnPolicyStage",
    "RankMethod",
    "RankStage",
    "ReportStage",
    "ScheduleStage",
    "SearchStage",
    "SftStage",
    "StageSpec",
    "StopSpec",
    "TextStage",
    "ThroughputStage",
    "TracesStage",
    "TrainStage",
    "control_name",
    "distilled_name",
]

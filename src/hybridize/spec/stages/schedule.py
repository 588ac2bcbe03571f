"""The staged conversion: a few layers at a time, ranked again before each, always distilled from the teacher."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from hybridize.spec.stages.base import TEACHER, MixedStage, as_stage
from hybridize.spec.stages.evaluate import EvaluateStage, ThroughputStage
from hybridize.spec.stages.rank import RankStage
from hybridize.spec.stages.train import DistillStage, FitStage

_INNER = "inner"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, dict) else () if value is None else value


Rank = Annotated[RankStage, BeforeValidator(as_stage("rank"))]
Fit = Annotated[FitStage, BeforeValidator(as_stage("fit", model=_INNER))]
Distill = Annotated[DistillStage, BeforeValidator(as_stage("distill", model=_INNER))]
Evaluate = Annotated[EvaluateStage, BeforeValidator(as_stage("evaluate", model=_INNER))]
Throughput = Annotated[ThroughputStage, BeforeValidator(as_stage("throughput", model=_INNER))]


class ScheduleStage(MixedStage):
    """Convert in stages. It stands for a rank, a convert, perhaps a fit, and a distill stage per count of layers.

    They are called `<name>-<count>-rank`, `-convert`, `-fit`, `-distill`, `-judge` (a second one `-judge-2`, and so on)
    and `-speed`. Other stages refer to the last model by the schedule's own name, and to another by
    `<name>-<count>-distill` with the count as written here, whatever it is scaled to.

    Attributes:
        layers: how many layers are mixers after each stage, ascending. The paper: 25, 27, 30, 34, 37, 40.
        of: the number of layers that these counts are meant for; they are scaled to the teacher's depth. Without it
            they are taken as they are.
        rank: settings of the ranking before the stages, for all or one for each; by default MMR on the current hybrid.
        mixer: what layers become.
        init: how it starts.
        fit: settings of the per-layer fit before the first distillation; by default there is none.
        distill: settings of the distillation, for all stages or one for each.
        evaluate: settings of a judgement after each stage, or of several; by default there is none.
        throughput: settings of a measurement of speed after each stage; by default there is none.
        label: what reports call its models, before their counts; for a recipe with more than one schedule.
        seed: of the conversions.
    """

    kind: Literal["schedule"] = "schedule"
    layers: tuple[int, ...] = Field(min_length=1)
    of: int | None = Field(default=None, gt=0)
    rank: Annotated[tuple[Rank, ...], BeforeValidator(_as_list)] = (RankStage(name="rank"),)
    fit: Fit | None = None
    distill: Annotated[tuple[Distill, ...], BeforeValidator(_as_list)] = Field(min_length=1)
    evaluate: Annotated[tuple[Evaluate, ...], BeforeValidator(_as_list)] = ()
    throughput: Throughput | None = None
    label: str = ""
    seed: int = 0

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 1:
            raise ValueError(f"layers: {list(self.layers)} must be at least 1 and rise from stage to stage")
        if self.of is not None and self.layers[-1] > self.of:
            raise ValueError(f"layers: {self.layers[-1]} is more than of, {self.of}; no model has so many")
        for field, settings in (("rank", self.rank), ("distill", self.distill)):
            if len(settings) not in (1, len(self.layers)):
                raise ValueError(
                    f"{field}: {len(settings)} settings for {len(self.layers)} stages; give one, or one for each"
                )
        return self

    def counts(self, num_layers: int) -> tuple[int, ...]:
        """The counts for a teacher of that depth; two that scale to the same one become one, its settings the later's.

        Raises:
            ValueError: there are not so many layers.
        """
        scaled = [max(1, round(count * num_layers / self.of)) if self.of else count for count in self.layers]
        if scaled[-1] > num_layers:
            raise ValueError(f"layers: {scaled[-1]} is more than the teacher has, {num_layers}; use 1..{num_layers}")
        return tuple(scaled)

    @property
    def models(self) -> tuple[str, ...]:
        """It starts from the teacher."""
        return (TEACHER,)


def distilled_name(schedule: ScheduleStage, count: int) -> str:
    """What the model with so many mixers is called."""
    return f"{schedule.name}-{count}-distill"

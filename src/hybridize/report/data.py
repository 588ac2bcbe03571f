"""Everything a report can show, as a frozen tree of plain Python values. An empty section is left out."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ranking:
    """One method's opinion on which layers matter.

    Attributes:
        method: its name, e.g. `MMR` or `uniform`.
        scores: importance of each layer of the teacher, in `unit`; None where the method gave none.
        order: layers from the least important to the most; it may be partial.
        chosen: the layers this ranking would replace (or did).
        unit: what the scores are measured in.
        is_control: whether the method ignores the model (uniform, random) and is there to be beaten.
    """

    method: str
    scores: tuple[float | None, ...]
    order: tuple[int, ...]
    chosen: tuple[int, ...]
    unit: str = "nat/token"
    is_control: bool = False

    def __post_init__(self) -> None:
        for name in ("order", "chosen"):
            layers = getattr(self, name)
            if len(set(layers)) != len(layers):
                raise ValueError(f"ranking {self.method!r}: {name} names a layer twice: {list(layers)}")
            outside = [layer for layer in layers if not 0 <= layer < len(self.scores)]
            if outside:
                raise ValueError(
                    f"ranking {self.method!r}: {name} names layers {outside}; "
                    f"scores (None where unknown) are given for 0..{len(self.scores) - 1}"
                )


@dataclass(frozen=True)
class LossCurve:
    """A training run's loss over time.

    Attributes:
        name: identifies the run among the artifacts.
        label: what to call it in the legend.
        steps: optimiser steps, one per point.
        losses_nats: loss at each point, in nat per token.
        tokens: tokens trained on up to each point.
        is_control: whether the run is there to be beaten (e.g. from random initialisation).
    """

    name: str
    label: str
    steps: tuple[int, ...]
    losses_nats: tuple[float, ...]
    tokens: tuple[int, ...]
    is_control: bool = False

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.losses_nats) == len(self.tokens):
            raise ValueError(
                f"loss curve {self.name!r}: {len(self.steps)} steps, {len(self.losses_nats)} losses and "
                f"{len(self.tokens)} token counts; give one of each per point"
            )


@dataclass(frozen=True)
class Score:
    """Right answers out of all, as shares in 0..1 with the ends of a 95% interval."""

    correct: int
    total: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """How well one model answers.

    Attributes:
        point: which model of the study: `teacher`, `converted`, `distilled`, `random init: distilled`, ...
            The headline reads `teacher`, `distilled` and `random init: distilled`.
        label: what to call it in charts and tables.
        overall: over all tasks.
        tasks: by task; may be empty.
        steps_correct: of the `overall.total` answers, those with every step right too; None if not judged.
        is_control: whether the model is there to be beaten.
    """

    point: str
    label: str
    overall: Score
    tasks: Mapping[str, Score] = field(default_factory=dict)
    steps_correct: int | None = None
    is_control: bool = False


@dataclass(frozen=True)
class CacheMemory:
    """What a sequence holds: `kv_bytes_per_token` x its length in tokens + `state_bytes_per_sequence`."""

    label: str
    kv_bytes_per_token: int
    state_bytes_per_sequence: int

    def bytes_at(self, context_tokens: float) -> float:
        """Bytes of cache of one sequence of that many tokens."""
        return self.kv_bytes_per_token * context_tokens + self.state_bytes_per_sequence


@dataclass(frozen=True)
class StageCost:
    """What a stage took. `tokens` and `trained_parameters` are None where a stage has none."""

    stage: str
    seconds: float
    tokens: int | None = None
    trained_parameters: int | None = None
    status: str = "done"


@dataclass(frozen=True)
class ReportData:
    """One run.

    Attributes:
        title: the page's title.
        created: when the run ended, as text; the only time on the page.
        teacher: the teacher's name.
        layout: mixer type of each layer of the hybrid, from the first; e.g. `attention`, `mamba1`.
        recipe: the recipe as YAML text.
        versions: software name to version.
        rankings: methods and controls; a page with a ranking but no control says so.
        losses: curves, in the legend's order.
        evaluations: models, in the order of the charts; teacher first.
        memory: models; the first is what the others are compared with.
        costs: stages in order.
    """

    title: str
    created: str
    teacher: str
    layout: tuple[str, ...]
    recipe: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    rankings: tuple[Ranking, ...] = ()
    losses: tuple[LossCurve, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    memory: tuple[CacheMemory, ...] = ()
    costs: tuple[StageCost, ...] = ()

    def __post_init__(self) -> None:
        for ranking in self.rankings:
            if len(ranking.scores) != len(self.layout):
                raise ValueError(
                    f"ranking {ranking.method!r}: {len(ranking.scores)} scores for {len(self.layout)} "
                    "layers; give one per layer, None where unknown"
                )

    def evaluation(self, point: str) -> Evaluation | None:
        """The evaluation of that point, or None if it was not run."""
        return next((entry for entry in self.evaluations if entry.point == point), None)


def break_even_tokens(baseline: CacheMemory, other: CacheMemory) -> float | None:
    """Context length from which `other` holds less than `baseline`; None if it never does, or always."""
    saved_per_token = baseline.kv_bytes_per_token - other.kv_bytes_per_token
    extra_state = other.state_bytes_per_sequence - baseline.state_bytes_per_sequence
    return extra_state / saved_per_token if saved_per_token > 0 and extra_state > 0 else None

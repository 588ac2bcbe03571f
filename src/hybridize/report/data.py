"""Everything a report can show, as a frozen tree of plain Python values. An empty section is left out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybridize.report.measures import (
    CacheMemory,
    Evaluation,
    HarnessScore,
    LossCurve,
    Merge,
    Ranking,
    Search,
    StageCost,
    TextScore,
    Throughput,
    Traces,
)

TEACHER = "teacher"
"""The name, and the point, of the model that all others are compared with."""


@dataclass(frozen=True)
class TokenSpend:
    """What one stage trained on."""

    stage: str
    tokens: int


@dataclass(frozen=True)
class Model:
    """A model of the study; what was measured of it refers to it by `name`.

    Attributes:
        name: the stage that made it, or `teacher`.
        label: what to call it in charts and tables.
        num_mixers: how many of its layers are mixers; None if unknown. 0 for the teacher.
        tokens: what each stage on its way from the teacher trained on, its own stage included, in order. A stage
            that two parents share (the trunk of a merge) stands once.
        is_control: whether the model is there to be beaten.
        series: of models that differ in their number of mixer layers, what it is called; empty if it is in none.
    """

    name: str
    label: str
    num_mixers: int | None = None
    tokens: tuple[TokenSpend, ...] = ()
    is_control: bool = False
    series: str = ""

    def __post_init__(self) -> None:
        stages = [spend.stage for spend in self.tokens]
        if len(set(stages)) != len(stages):
            raise ValueError(f"model {self.name!r}: tokens count a stage twice: {stages}; list each stage once")

    @property
    def is_teacher(self) -> bool:
        """Whether it is the teacher itself."""
        return self.name == TEACHER

    @property
    def cumulative_tokens(self) -> int | None:
        """Tokens spent on it so far; None if no stage is listed."""
        return sum(spend.tokens for spend in self.tokens) if self.tokens else None


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
        rankings: methods and controls, in the order of their stages; a page with a ranking but no control says so.
        losses: curves, in the legend's order.
        evaluations: models, in the order of the charts; teacher first.
        memory: models; the first is what the others are compared with.
        costs: stages in order.
        models: labels, mixer layers and tokens of what was measured. A model that is not listed goes by its name.
        throughput: measurements; each model may have several, in different settings.
        harness: results of lm-evaluation-harness. Of several metrics of a task, the first enters the mean.
        texts: perplexities.
        traces: training data that the run made.
        merges: models that were made by merging.
        searches: choices of a mixer for each layer, with what they predict.
        result: name of the model that the first sentence is about; by default the last one judged that is neither
            the teacher, a control nor untrained.
        stale: stages whose results were made from what has changed since, and what that is, in words.
        throughput_notes: measurements of speed that were left out, and why, in words.
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
    models: tuple[Model, ...] = ()
    throughput: tuple[Throughput, ...] = ()
    harness: tuple[HarnessScore, ...] = ()
    texts: tuple[TextScore, ...] = ()
    traces: tuple[Traces, ...] = ()
    merges: tuple[Merge, ...] = ()
    searches: tuple[Search, ...] = ()
    result: str = ""
    stale: Mapping[str, str] = field(default_factory=dict)
    throughput_notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for ranking in self.rankings:
            if len(ranking.scores) != len(self.layout):
                raise ValueError(
                    f"ranking {ranking.method!r}: {len(ranking.scores)} scores for {len(self.layout)} "
                    "layers; give one per layer, None where unknown"
                )
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"models: a name stands twice in {names}; list each model once")

    def evaluation(self, point: str) -> Evaluation | None:
        """The first evaluation of that point, or None if it was not run."""
        return next((entry for entry in self.evaluations if entry.point == point), None)

    def model(self, name: str) -> Model:
        """The model of that name; one that is not listed goes by its evaluation's label, or by its name."""
        listed = next((model for model in self.models if model.name == name), None)
        if listed is not None:
            return listed
        judged = next((entry for entry in self.evaluations if entry.key == name), None)
        return Model(name, name) if judged is None else Model(name, judged.label, is_control=judged.is_control)


def break_even_tokens(baseline: CacheMemory, other: CacheMemory) -> float | None:
    """Context length from which `other` holds less than `baseline`; None if it never does, or always."""
    saved_per_token = baseline.kv_bytes_per_token - other.kv_bytes_per_token
    extra_state = other.state_bytes_per_sequence - baseline.state_bytes_per_sequence
    return extra_state / saved_per_token if saved_per_token > 0 and extra_state > 0 else None

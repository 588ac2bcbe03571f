"""What was measured, one record per measurement. Records refer to a model by the name of the stage that made it."""

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
        before: of each layer, the same measurement before any training: the loss with the mixer as initialised.
            Empty where the method trains nothing.
        steps: training steps between `before` and `scores`; None if unknown.
        stage: what this ranking was made for, e.g. `4 of 16 layers`; rankings of one stage are shown together.
        paper: where the method comes from.
        replaced: layers that were mixers already when the ranking was made.
        series: of the models that it was made for; empty if it is in none.
        detail: what tells it apart from others by its method, e.g. `mamba2, neutral`; empty if nothing need.
    """

    method: str
    scores: tuple[float | None, ...]
    order: tuple[int, ...]
    chosen: tuple[int, ...]
    unit: str = "nat/token"
    is_control: bool = False
    before: tuple[float | None, ...] = ()
    steps: int | None = None
    stage: str = ""
    paper: str = ""
    replaced: tuple[int, ...] = ()
    series: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        for name in ("order", "chosen", "replaced"):
            layers = getattr(self, name)
            if len(set(layers)) != len(layers):
                raise ValueError(f"ranking {self.method!r}: {name} names a layer twice: {list(layers)}")
            outside = [layer for layer in layers if not 0 <= layer < len(self.scores)]
            if outside:
                raise ValueError(
                    f"ranking {self.method!r}: {name} names layers {outside}; "
                    f"scores (None where unknown) are given for 0..{len(self.scores) - 1}"
                )
        if self.before and len(self.before) != len(self.scores):
            raise ValueError(
                f"ranking {self.method!r}: {len(self.before)} values before training for {len(self.scores)} scores; "
                "give one per layer, None where unknown"
            )

    @property
    def rule(self) -> str:
        """Its method, with what tells it apart."""
        return f"{self.method}, {self.detail}" if self.detail else self.method

    @property
    def title(self) -> str:
        """Its name among others: what it was made for, and its rule."""
        return f"{self.stage}: {self.rule}" if self.stage else self.rule

    @property
    def is_scored(self) -> bool:
        """Whether the method gave any layer a score."""
        return any(score is not None for score in self.scores)

    @property
    def slopes(self) -> tuple[tuple[int, float, float], ...]:
        """(layer, before, after) of each layer that has both."""
        return tuple(
            (layer, before, after)
            for layer, (before, after) in enumerate(zip(self.before, self.scores, strict=False))
            if before is not None and after is not None
        )


@dataclass(frozen=True)
class LossCurve:
    """A training run's loss over time.

    Attributes:
        name: identifies the run among the artifacts.
        label: what to call it in the legend.
        steps: optimiser steps, one per point.
        losses: loss at each point, in `unit`.
        tokens: tokens trained on up to each point.
        is_control: whether the run is there to be beaten (e.g. from random initialisation).
        unit: of the loss: `nat/token`; for the fit of a layer `of the output's variance`.
        kind: what the loss is, e.g. `distillation`, `SFT`, `on-policy distillation`, `fit`. Curves that differ in
            kind or unit are drawn in panels of their own.
        series: of the model; empty if it is in none.
    """

    name: str
    label: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    is_control: bool = False
    unit: str = "nat/token"
    kind: str = "distillation"
    series: str = ""

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.losses) == len(self.tokens):
            raise ValueError(
                f"loss curve {self.name!r}: {len(self.steps)} steps, {len(self.losses)} losses and "
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
            The headline reads `teacher`, `random init: distilled` and, unless told otherwise, the last of the others
            that is no control and not `converted`.
        label: what to call it in charts and tables.
        overall: over all tasks.
        tasks: by task; may be empty.
        steps_correct: of the `overall.total` answers, those with every step right too; None if not judged.
        is_control: whether the model is there to be beaten.
        model: the model's name; by default its label.
        suite: what was asked, e.g. `level 2, greedy`. Evaluations of one suite are comparable and share a chart.
        pass_at: by k, the share of problems that at least one of k sampled answers solves; 0..1.
    """

    point: str
    label: str
    overall: Score
    tasks: Mapping[str, Score] = field(default_factory=dict)
    steps_correct: int | None = None
    is_control: bool = False
    model: str = ""
    suite: str = ""
    pass_at: Mapping[int, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name that joins it with other measurements of the model."""
        return self.model or ("teacher" if self.point == "teacher" else self.label)


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one lm-evaluation-harness task.

    Attributes:
        model: the model's name.
        task: the task's name.
        metric: the metric's name, its filter included where there are several.
        value: in the metric's own unit; for a share 0..1.
        stderr: standard error of `value`; None if the harness gave none.
        num_samples: how many problems; None if unknown.
        is_share: whether it is a share of right answers (higher is better) and may enter the mean over tasks.
    """

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None = None
    num_samples: int | None = None
    is_share: bool = True


@dataclass(frozen=True)
class Serving:
    """How a server was run: speeds under the same are comparable.

    Attributes:
        version: of the engine.
        device: what it ran on, e.g. a GPU's name.
        scenario: what each sequence reads and writes, in words, e.g. `1 to 16k tokens`.
        crowd: how many sequences at a time, in words.
        options: what else was asked for, in words.
        engine: its name.
    """

    version: str
    device: str
    scenario: str
    crowd: str
    options: tuple[str, ...] = ()
    engine: str = "vLLM"

    def __str__(self) -> str:
        parts = (f"{self.engine} {self.version} on {self.device}", self.scenario, self.crowd, *self.options)
        return ", ".join(parts)


@dataclass(frozen=True)
class Throughput:
    """How fast a model generates.

    Attributes:
        model: the model's name.
        tokens_per_second: generated over the whole batch: the median of the repeats.
        low: the slowest repeat.
        high: the fastest repeat.
        batch_size: sequences at a time.
        prompt_tokens: length of each prompt.
        new_tokens: generated for each.
        repeats: how many measurements.
        serving: the server that it was measured in; None: the run's own stage did.
        layout_of: the model that stands for its layout, if what was measured is the layout and another has it too.
    """

    model: str
    tokens_per_second: float
    low: float
    high: float
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    serving: Serving | None = None
    layout_of: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.tokens_per_second <= self.high:
            raise ValueError(
                f"throughput of {self.model!r}: {self.tokens_per_second} tokens/s is not within its repeats, "
                f"{self.low}..{self.high}, all above 0; give the median, the slowest and the fastest"
            )


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts plain text.

    Attributes:
        model: the model's name.
        text: which text.
        num_tokens: predicted.
        nats_per_token: mean negative log-likelihood.
        perplexity: its exponential.
        kl_nats: mean divergence from the teacher there, nat per token; None for the teacher, or if not measured.
    """

    model: str
    text: str
    num_tokens: int
    nats_per_token: float
    perplexity: float
    kl_nats: float | None = None


@dataclass(frozen=True)
class Traces:
    """Answers that a model was let give to make training data.

    Attributes:
        stage: the stage that made them.
        model: the name of the model that answered.
        num_prompts: asked.
        samples_per_prompt: answers to each.
        num_answers: all answers that were judged.
        num_verified: of them, those found right and kept.
        num_tokens: of the kept answers.
        verifier: who judged; `none` if all were kept.
    """

    stage: str
    model: str
    num_prompts: int
    samples_per_prompt: int
    num_answers: int
    num_verified: int
    num_tokens: int
    verifier: str = ""

    @property
    def verified_share(self) -> float | None:
        """Share of the answers that were found right; None if there are no answers."""
        return self.num_verified / self.num_answers if self.num_answers else None


@dataclass(frozen=True)
class Merge:
    """How a model was merged.

    Attributes:
        model: the merged model's name.
        method: `linear`, `slerp` or `ties`.
        sources: names of the models merged.
        weights: of each source, as they were applied.
        base: name of the common starting point; empty if the method needs none.
        density: share of each difference that was kept; None if the method keeps all.
    """

    model: str
    method: str
    sources: tuple[str, ...]
    weights: tuple[float, ...]
    base: str = ""
    density: float | None = None

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.weights):
            raise ValueError(
                f"merge {self.model!r}: {len(self.weights)} weights for {len(self.sources)} sources; give one for each"
            )


@dataclass(frozen=True)
class CacheMemory:
    """What a sequence holds: `kv_bytes_per_token` x its length in tokens + `state_bytes_per_sequence`.

    Attributes:
        label: what to call the model.
        kv_bytes_per_token: of all its attention layers.
        state_bytes_per_sequence: of all its mixers.
        model: the model's name; by default its label.
        series: of the model; empty if it is in none.
    """

    label: str
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    model: str = ""
    series: str = ""

    @property
    def key(self) -> str:
        """The name that joins it with other measurements of the model."""
        return self.model or self.label

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
class SearchPoint:
    """A layout with what is predicted of it.

    Attributes:
        layout: one letter a layer.
        num_replaced: layers that are not attention.
        loss: predicted, in the search's unit.
        cost: predicted.
        speedup: the teacher's cost over this one's.
        groups: of layers, in vLLM's cache.
    """

    layout: str
    num_replaced: int
    loss: float
    cost: float
    speedup: float
    groups: int


@dataclass(frozen=True)
class SearchCurve:
    """Layouts of one rule, by ascending speedup; `is_control`: the rule looks at no score."""

    label: str
    points: tuple[SearchPoint, ...]
    is_control: bool = False


@dataclass(frozen=True)
class MeasuredLoss:
    """The loss of a model, in the first and the last step of the distillation `model`, after so many tokens."""

    model: str
    first: float
    last: float
    tokens: int


@dataclass(frozen=True)
class Search:
    """A choice of a mixer for each layer, with predictions.

    Attributes:
        name: of the stage.
        layout: the chosen one, one letter a layer.
        meanings: mixer types by letter.
        chosen: the chosen layout's predictions.
        curves: the frontier first, then single mixers in the best layers and, as controls, in evenly spaced ones.
        verdict: whether mixtures are predicted to beat single mixers, in words.
        is_exact: whether all numbers of layers of each kind were looked at.
        method: of the rankings that the losses come from.
        unit: of the losses.
        cost_unit: of the costs.
        measured: losses of models with the chosen layout.
    """

    name: str
    layout: str
    meanings: Mapping[str, str]
    chosen: SearchPoint
    curves: tuple[SearchCurve, ...]
    verdict: str
    is_exact: bool
    method: str
    unit: str
    cost_unit: str
    measured: tuple[MeasuredLoss, ...] = ()

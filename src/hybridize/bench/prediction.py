"""What serving will cost, reckoned from sizes alone, the way vLLM lays out its cache; imports no torch.

A decode step reads all weights once, the keys and values of every sequence, and reads and writes every mixer's state.
That over the memory's bandwidth is the floor. `StepCosts` says how far above it a step is.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from hybridize.bench.scenarios import Scenario
from hybridize.spec.cache_groups import group_layers

GB = 1e9
MANY_GROUPS = 6
"""Groups of vLLM's cache from which on a layout is warned of."""

UNCACHED_SEQUENCES = 1024
"""Sequences of a model that keeps nothing for them: what vLLM's scheduler takes at a time by default on large GPUs."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU offers.

    Attributes:
        memory: bytes.
        copy_bandwidth: bytes per second that a large copy moves, read and written ones counted.
        flops: dense bf16 peak, floating-point operations per second.
        step_tokens: tokens that vLLM's offline engine takes into one step on it.
    """

    memory: float
    copy_bandwidth: float
    flops: float
    step_tokens: int = 16384


COPY_SHARE = 0.9
"""Of the data sheet's bandwidth, what a copy reaches, in round numbers: 4.22 of 4.8 TB/s measured on an H200."""

GPUS: dict[str, Gpu] = {
    "h200": Gpu(150.7 * GB, 4220 * GB, 989e12),
    "h100": Gpu(85.5 * GB, COPY_SHARE * 3350 * GB, 989e12),
    "a100": Gpu(85.9 * GB, COPY_SHARE * 2039 * GB, 312e12, 8192),
    "l40s": Gpu(48.3 * GB, COPY_SHARE * 864 * GB, 362e12, 8192),
}
"""Memory as the driver reports it; H200's copy is measured, the others' bandwidth and all peaks from data sheets."""


@dataclass(frozen=True)
class StepCosts:
    """How far real steps are above the floor. Every constant that is not a size or a data sheet's is here.

    Attributes:
        stream_share: of the copy's bandwidth, at which weights, keys and values are read.
        state_share: of the copy's bandwidth, at which states are read and written.
        seconds_per_step: whatever the model: scheduling that is not hidden, sampling.
        seconds_per_group: metadata and block tables of one more group of vLLM's cache.
        prefill_share: of the peak, at which prompts are read.
        reserved_bytes: context, graphs and what else is taken beside weights, activations and cache.
    """

    stream_share: float
    state_share: float
    seconds_per_step: float
    seconds_per_group: float
    prefill_share: float
    reserved_bytes: float


# Least squares over the 45 decode steps of docs/results/serving/records.jsonl (one H200, vLLM 0.26, 15B shape: the
# teacher and four hybrids at three lengths of 1 -> 16k), relative error 0.8%. A share above 1: reading alone is faster
# than the copy. Not from there: the prompts' share, of the teacher's about 25k tokens/s on the same card.
STEP_COSTS = StepCosts(
    stream_share=1.08,
    state_share=0.94,
    seconds_per_step=2.99e-3,
    seconds_per_group=0.34e-3,
    prefill_share=0.65,
    reserved_bytes=1.0 * GB,
)


@dataclass(frozen=True)
class ServedShape:
    """The sizes of a model that decide what serving it costs.

    Attributes:
        weight_bytes: of all weights.
        read_bytes: of the weights that a step reads: all but an input embedding of its own.
        flops_per_token: of a forward pass, attention scores left out.
        score_flops: of one query over one token of context, in one layer.
        activation_bytes: per token of a step, at the widest place.
        kv_bytes: of one token's key and value in one layer.
        windows: per attention layer, its window's tokens; None: the whole context.
        states: per layer with a state, its bytes.
    """

    weight_bytes: int
    read_bytes: int
    flops_per_token: float
    score_flops: float
    activation_bytes: int
    kv_bytes: int
    windows: tuple[int | None, ...]
    states: tuple[int, ...]

    def context_bytes(self, context: float) -> float:
        """Bytes of keys and values of one sequence that a step reads."""
        return self.kv_bytes * sum(context if w is None else min(context, w) for w in self.windows)

    def step_bytes(self, sequences: int, context: float) -> tuple[float, float]:
        """Bytes that a decode step must move: weights, keys and values read once; states read and written once."""
        states = 2.0 * sequences * sum(self.states)
        return self.read_bytes + sequences * self.context_bytes(context), states


@dataclass(frozen=True)
class CachePlan:
    """How vLLM lays out the cache of a model (releases 0.26 to 0.32).

    Layers of a kind (whole attention, windows of one length, mixers) are cut into groups of `group_layers`. A block is
    one page for each layer of a group, and a page holds `block_tokens` tokens of attention or one mixer's state.

    Attributes:
        kinds: groups by kind: None is whole attention, a number a window, "state" the mixers.
        group_layers: layers of a group.
        block_tokens: tokens of a page of attention.
        page_bytes: of a page.
    """

    kinds: dict[int | str | None, int]
    group_layers: int
    block_tokens: int
    page_bytes: int

    @classmethod
    def of(cls, shape: ServedShape, alignment: int = 16) -> "CachePlan":
        """Lay out a model's cache.

        Args:
            shape: the model's sizes.
            alignment: tokens by which the attention kernels' blocks can grow.
        """
        layers: Counter[int | str | None] = Counter(shape.windows)
        if shape.states:
            layers["state"] = len(shape.states)
        if not layers:
            return cls({}, 0, alignment, 0)
        size, kinds = group_layers(layers)
        state = max(shape.states, default=0)
        block = alignment * max(1, -(-state // (alignment * shape.kv_bytes)))
        page = block * shape.kv_bytes if shape.windows else state
        return cls(kinds, size, block, page)

    @property
    def groups(self) -> int:
        """Of all kinds."""
        return sum(self.kinds.values())

    @property
    def block_bytes(self) -> int:
        """Of a block: a page for each layer of a group."""
        return self.group_layers * self.page_bytes

    def blocks(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds."""
        return sum(count * self._of_kind(kind, tokens) for kind, count in self.kinds.items())

    def sequences(self, cache_bytes: float, tokens: int) -> int:
        """Sequences of so many tokens that a cache holds; one block is vLLM's own."""
        held = self.blocks(tokens)
        if not held:  # nothing is kept, so the scheduler's own limit is what bounds them
            return UNCACHED_SEQUENCES if cache_bytes > 0 else 0
        return max(0, (int(cache_bytes // self.block_bytes) - 1) // held)

    def _of_kind(self, kind: int | str | None, tokens: int) -> int:
        if kind == "state":
            return 1
        whole = -(-tokens // self.block_tokens)
        return whole if kind is None else min(whole, -(-int(kind) // self.block_tokens) + 1)


@dataclass(frozen=True)
class Prediction:
    """What is expected of a model in a scenario.

    Attributes:
        groups: of vLLM's cache.
        sequences: that the memory holds when they are complete; 0: not even one.
        step_ms: of a decode step, the mean of the scenario.
        floor_ms: of the same, at the copy's bandwidth.
        prefill_seconds: until all prompts are read.
        tokens_per_second: generated, of all sequences, prompts' time included.
    """

    groups: int
    sequences: int
    step_ms: float
    floor_ms: float
    prefill_seconds: float
    tokens_per_second: float

    @property
    def gpu_hours_per_million(self) -> float:
        """GPU hours in which a million tokens are generated."""
        return 1e6 / self.tokens_per_second / 3600 if self.tokens_per_second else float("inf")


def cache_bytes(shape: ServedShape, gpu: Gpu, utilization: float, costs: StepCosts = STEP_COSTS) -> float:
    """Bytes that are left for the cache."""
    activations = gpu.step_tokens * shape.activation_bytes
    return max(0.0, utilization * gpu.memory - shape.weight_bytes - activations - costs.reserved_bytes)


def step_seconds(
    shape: ServedShape, gpu: Gpu, sequences: int, context: float, groups: int, costs: StepCosts = STEP_COSTS
) -> float:
    """Seconds of a decode step of so many sequences at a context."""
    streamed, states = shape.step_bytes(sequences, context)
    return (
        streamed / (costs.stream_share * gpu.copy_bandwidth)
        + states / (costs.state_share * gpu.copy_bandwidth)
        + costs.seconds_per_step
        + costs.seconds_per_group * (groups - 1)
    )


def floor_seconds(shape: ServedShape, copy_bandwidth: float, sequences: int, context: float) -> float:
    """Seconds that the memory's bandwidth alone takes for a decode step."""
    return sum(shape.step_bytes(sequences, context)) / copy_bandwidth


def predict(
    shape: ServedShape, gpu: Gpu, scenario: Scenario, *, utilization: float = 0.9, costs: StepCosts = STEP_COSTS
) -> Prediction:
    """Predict what a model does in a scenario on one GPU.

    Args:
        shape: the model's sizes.
        gpu: what it runs on.
        scenario: what it is asked; all sequences start together, as many as the memory holds when they are complete.
        utilization: share of the memory that vLLM may take.
        costs: how far steps are above the floor.
    """
    plan = CachePlan.of(shape)
    sequences = plan.sequences(cache_bytes(shape, gpu, utilization, costs), scenario.tokens)
    if not sequences:
        return Prediction(plan.groups, 0, 0.0, 0.0, 0.0, 0.0)
    prompt = scenario.prompt_tokens
    score = shape.score_flops * sum(prompt / 2 if w is None else min(prompt / 2, w) for w in shape.windows)
    prefill = sequences * prompt * (shape.flops_per_token + score) / (costs.prefill_share * gpu.flops)
    if prompt == 1:  # a decode step like the others
        prefill = 0.0
    contexts = [prompt + share * scenario.new_tokens for share in _middles(64)]
    steps = [step_seconds(shape, gpu, sequences, context, plan.groups, costs) for context in contexts]
    floors = [floor_seconds(shape, gpu.copy_bandwidth, sequences, context) for context in contexts]
    step, floor = sum(steps) / len(steps), sum(floors) / len(floors)
    rate = sequences * scenario.new_tokens / (prefill + scenario.new_tokens * step)
    return Prediction(plan.groups, sequences, 1e3 * step, 1e3 * floor, prefill, rate)


def group_warning(name: str, shape: ServedShape) -> str | None:
    """Warn of a number of layers that vLLM cuts into many groups or pads a lot; None if there is nothing to say."""
    plan = CachePlan.of(shape)
    layers: Counter[int | str | None] = Counter(shape.windows)
    if shape.states:
        layers["state"] = len(shape.states)
    slots = plan.group_layers * plan.groups
    if plan.groups < MANY_GROUPS and slots <= 1.25 * max(1, sum(layers.values())):
        return None
    counts = " + ".join(f"{count} {_kind_name(kind)}" for kind, count in layers.items())
    cost = "each is worked on at every step"
    if plan.groups < MANY_GROUPS:
        cost = f"{slots - sum(layers.values())} of {slots} layers' places in the cache stay empty"
    best = _better_split(layers)
    advice = f"{best} would make fewer" if best else "choose numbers of layers that divide one another"
    made = f"{plan.groups} groups of {plan.group_layers}"
    return f"{name}: {counts} layers make {made} in vLLM's cache, and {cost}; {advice}"


def _better_split(layers: Counter[int | str | None]) -> str | None:
    """The nearest numbers of two kinds of layers that fill few groups; None if there are not two kinds."""
    if len(layers) != 2:
        return None
    (first, one), (second, other) = layers.items()
    total = one + other
    splits = [n for n in range(1, total) if (total - n) % n == 0 or n % (total - n) == 0]
    few = [n for n in splits if max(n, total - n) // min(n, total - n) + 1 < MANY_GROUPS]
    if not few:
        return None
    best = min(few, key=lambda n: abs(n - one))
    return f"{best} {_kind_name(first)} + {total - best} {_kind_name(second)}"


def _kind_name(kind: int | str | None) -> str:
    return "attention" if kind is None else "mixer" if kind == "state" else f"window-{kind}"


def _middles(count: int) -> Iterator[float]:
    return ((i + 0.5) / count for i in range(count))

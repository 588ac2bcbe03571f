"""What a layout costs to run, as a function of how many layers are of which kind; imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybridize.bench.prediction import GPUS, Gpu, predict
from hybridize.bench.scenarios import Scenario, read_scenarios
from hybridize.pipeline.serving_cost import served_shape
from hybridize.pipeline.sizes import TeacherShape, mixer_parameters, state_numbers
from hybridize.spec.base import choose
from hybridize.spec.mixers import AttentionSpec, IdentitySpec, MixerSpec, SlidingWindowSpec

Cost = Callable[[Sequence[int]], float]
"""Takes the numbers of layers that are attention, and each of some mixers."""

_DTYPE_BYTES = 2
"""Of weights, keys, values and a convolution's inputs: bf16."""

_STATE_BYTES = 4
"""Of a recurrence's state: fp32."""


def decode_bytes(
    config: Mapping[str, Any], mixers: Sequence[MixerSpec], *, context_tokens: int, concurrency: int
) -> Cost:
    """A cost function: bytes that a decode step must move for each sequence.

    Weights are read once a step, whatever the number of sequences; keys and values once, at most a window's; states are
    read and written.

    Args:
        config: the teacher's.
        mixers: what layers can become, sizes filled in or not.
        context_tokens: tokens of each sequence.
        concurrency: sequences in a step.

    Returns:
        A function of the numbers of layers that are attention, and each of the mixers.
    """
    shape = TeacherShape.of(config)
    own_window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    rest = shape.active_parameters - shape.num_layers * shape.attention_parameters
    kinds: list[MixerSpec] = [AttentionSpec(), *mixers]
    of_layer = [
        _DTYPE_BYTES * mixer_parameters(spec, shape) / concurrency
        + _sequence_bytes(spec, shape, context_tokens, own_window)
        for spec in kinds
    ]

    def cost(counts: Sequence[int]) -> float:
        layers = sum(count * each for count, each in zip(counts, of_layer, strict=True))
        return layers + _DTYPE_BYTES * rest / concurrency

    return cost


def _sequence_bytes(spec: MixerSpec, shape: TeacherShape, context_tokens: int, own_window: int | None) -> float:
    """Bytes that a step moves in one layer for one sequence, weights left out."""
    if isinstance(spec, IdentitySpec):
        return 0.0
    if isinstance(spec, AttentionSpec | SlidingWindowSpec):
        window = own_window if isinstance(spec, AttentionSpec) else spec.window
        return 2.0 * _DTYPE_BYTES * shape.geometry.kv_width * min(context_tokens, window or context_tokens)
    recurrence, convolution = state_numbers(spec, shape.geometry)
    return 2.0 * (_STATE_BYTES * recurrence + _DTYPE_BYTES * convolution)


def check_serving(gpu: str, scenario: str, place: str) -> tuple[Gpu, Scenario]:
    """A GPU and a scenario by their names.

    Raises:
        ValueError: one is unknown; names `place`.
    """
    choose(f"{place}.gpu", gpu, GPUS)
    try:
        return GPUS[gpu], read_scenarios([scenario])[0]
    except ValueError as error:
        raise ValueError(f"{place}.scenario{str(error).removeprefix('--scenario')}") from None


@dataclass(frozen=True)
class _Part:
    """What one layer adds to a served model: parameters beyond attention's, its window if it attends, its state."""

    parameters: int
    windows: tuple[int | None, ...] = ()
    states: tuple[int, ...] = ()

    @classmethod
    def of(cls, spec: MixerSpec, shape: TeacherShape, own_window: int | None) -> "_Part":
        change = mixer_parameters(spec, shape) - shape.attention_parameters
        match spec:
            case AttentionSpec():
                return cls(change, (own_window,))
            case SlidingWindowSpec():
                return cls(change, (spec.window,))
            case IdentitySpec():
                return cls(change)
            case _:
                recurrence, convolution = state_numbers(spec, shape.geometry)
                return cls(change, (), (_STATE_BYTES * recurrence + _DTYPE_BYTES * convolution,))


def served_seconds(config: Mapping[str, Any], mixers: Sequence[MixerSpec], gpu: Gpu, scenario: Scenario) -> Cost:
    """A cost function: seconds a generated token is predicted to take in vLLM, with as many sequences as fit.

    Args:
        config: the teacher's.
        mixers: what layers can become, sizes filled in or not.
        gpu: what it runs on.
        scenario: what it is asked.

    Returns:
        A function of the numbers of layers that are attention, and each of the mixers; infinite where the memory holds
        not even one sequence.
    """
    shape = TeacherShape.of(config)
    teacher = served_shape(config, "a" * shape.num_layers)
    kinds: list[MixerSpec] = [AttentionSpec(), *mixers]
    alone = [_Part.of(spec, shape, teacher.windows[0]) for spec in kinds]

    def cost(counts: Sequence[int]) -> float:
        parts = list(zip(counts, alone, strict=True))
        change = sum(count * part.parameters for count, part in parts)
        served = replace(
            teacher,
            weight_bytes=teacher.weight_bytes + _DTYPE_BYTES * change,
            read_bytes=teacher.read_bytes + _DTYPE_BYTES * change,
            flops_per_token=teacher.flops_per_token + 2.0 * change,
            windows=tuple(window for count, part in parts for window in part.windows * count),
            states=tuple(state for count, part in parts for state in part.states * count),
        )
        speed = predict(served, gpu, scenario).tokens_per_second
        return 1.0 / speed if speed else float("inf")

    return cost

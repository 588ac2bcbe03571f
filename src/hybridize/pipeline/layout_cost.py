"""What a layout costs to run, as a function of how many layers are of which kind; imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridize.pipeline.sizes import TeacherShape, mixer_parameters, state_numbers
from hybridize.spec.mixers import AttentionSpec, IdentitySpec, MixerSpec, SlidingWindowSpec

_DTYPE_BYTES = 2
"""Of weights, keys, values and a convolution's inputs: bf16."""

_STATE_BYTES = 4
"""Of a recurrence's state: fp32."""


def decode_bytes(
    config: Mapping[str, Any], mixers: Sequence[MixerSpec], *, context_tokens: int, concurrency: int
) -> Callable[[Sequence[int]], float]:
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

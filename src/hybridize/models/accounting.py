"""What a sequence costs in memory while it is being generated."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from hybridize.mixers import build_mixer
from hybridize.models.families import geometry_of
from hybridize.models.surgery import layout_of
from hybridize.models.window import window_of
from hybridize.spec import AttentionSpec, MixerSpec, SlidingWindowSpec


@dataclass(frozen=True)
class CacheBytes:
    """Bytes held per sequence: `kv_per_token` for each of its tokens, `state` once.

    What a `sliding_window` layer keeps does not grow with the sequence: the keys and values of a full window are
    `state`. A window of the teacher's own bounds `kv_per_token`: such a layer then keeps at most the window's tokens
    (see `sequence_bytes`). Not counted are the two numbers a token by which one mixer of some layouts counts the
    tokens seen.
    """

    kv_per_token: int
    state: int

    def __iter__(self) -> Any:
        """Unpack as `kv_bytes_per_token, state_bytes_per_sequence`."""
        return iter((self.kv_per_token, self.state))


def cache_bytes(config: Any, dtype: torch.dtype) -> CacheBytes:
    """Count the cache of a teacher or a hybrid.

    Args:
        config: its config.
        dtype: of the activations; a recurrence's state is fp32 whatever the dtype.

    Returns:
        Key/value bytes per token and state bytes per sequence, summed over the layers.
    """
    kv = state = 0
    for layer, spec in enumerate(layout_of(config).layers):
        if isinstance(spec, AttentionSpec):
            kv += _token_bytes(config, dtype)
        elif isinstance(spec, SlidingWindowSpec):
            window = window_of(spec, config, layer)
            assert window is not None
            state += window * _token_bytes(config, dtype)
        else:
            state += _state_bytes(spec, config.hidden_size, dtype)
    return CacheBytes(kv, state)


def sequence_bytes(config: Any, dtype: torch.dtype, num_tokens: int) -> int:
    """Count the cache of one sequence of a given length, with all windows as far as they are full.

    Args:
        config: of a teacher or a hybrid.
        dtype: of the activations; a recurrence's state is fp32 whatever the dtype.
        num_tokens: of the sequence.
    """
    total = 0
    for layer, spec in enumerate(layout_of(config).layers):
        if isinstance(spec, AttentionSpec | SlidingWindowSpec):
            total += min(num_tokens, window_of(spec, config, layer) or num_tokens) * _token_bytes(config, dtype)
        else:
            total += _state_bytes(spec, config.hidden_size, dtype)
    return total


def _token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of a token's key and value in one layer."""
    geometry = geometry_of(config)
    return 2 * geometry.num_kv_heads * geometry.head_dim * dtype.itemsize


@functools.cache
def _state_bytes(spec: MixerSpec, hidden_size: int, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        return build_mixer(spec, hidden_size).state_bytes(dtype)

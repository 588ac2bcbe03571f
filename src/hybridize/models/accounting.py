"""What a sequence costs in memory while it is being generated."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from hybridize.mixers import build_mixer
from hybridize.models.families import geometry_of
from hybridize.models.surgery import layout_of
from hybridize.spec import AttentionSpec, Mamba1Spec


@dataclass(frozen=True)
class CacheBytes:
    """Bytes held per sequence: `kv_per_token` for each of its tokens, `state` once.

    A sliding window bounds the first: attention then keeps at most the window's tokens. Not counted are the two
    numbers a token by which one mixer of some layouts counts the tokens seen.
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
        dtype: of the activations; a scan's state is fp32 whatever the dtype.

    Returns:
        Key/value bytes per token and state bytes per sequence, summed over the layers.
    """
    geometry = geometry_of(config)
    kv = state = 0
    for spec in layout_of(config).layers:
        if isinstance(spec, AttentionSpec):
            kv += 2 * geometry.num_kv_heads * geometry.head_dim * dtype.itemsize
        else:
            state += _state_bytes(spec, geometry.hidden_size, dtype)
    return CacheBytes(kv, state)


@functools.cache
def _state_bytes(spec: Mamba1Spec, hidden_size: int, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        return build_mixer(spec, hidden_size).state_bytes(dtype)

"""A cache for generation that writes new keys and values into room set aside, where transformers' copies all it holds.

transformers' `DynamicLayer` makes new tensors of all keys and values at every token, which moves them twice more than
attention has to. What attention reads is the same, to the last bit. Nor are all rows moved when some leave.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

_SPARE_TOKENS = 64

_LETS_ROWS_LEAVE = {
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    getattr(cache_utils, "DummyLayer", DynamicLayer),  # of layers that hold nothing, in newer transformers
}


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, the first part of larger tensors that are replaced when they are full.

    Args:
        num_tokens: for how many tokens to set room aside at first; None: half more than there are.
    """

    keys: Any
    values: Any
    _key_room: Tensor | None = None
    _value_room: Tensor | None = None

    def __init__(self, num_tokens: int | None = None) -> None:
        super().__init__()
        self._num_tokens = num_tokens or 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values, [rows, heads, new tokens, width]; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._key_room, self.keys = _append(self._key_room, self.keys, key_states, self._num_tokens)
        self._value_room, self.values = _append(self._value_room, self.values, value_states, self._num_tokens)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows in the order of `beam_idx`, [rows to keep]; those whose place stays the same are not moved."""
        num_rows, num_tokens = len(beam_idx), self.get_seq_length()
        if not _is_in(self._key_room, self.keys) or num_rows > len(self.keys):
            super().reorder_cache(beam_idx)
            return
        beam_idx = beam_idx.to(self.keys.device)
        moved = (beam_idx != torch.arange(num_rows, device=beam_idx.device)).nonzero()[:, 0]
        for held in (self.keys, self.values):
            held[moved] = held[beam_idx[moved]]
        self._key_room, self._value_room = self._key_room[:num_rows], self._value_room[:num_rows]  # type: ignore[index]
        self.keys, self.values = self._key_room[..., :num_tokens, :], self._value_room[..., :num_tokens, :]

    def reset(self) -> None:
        """Forget all, and give the room back."""
        self._key_room = self._value_room = None
        self.keys = self.values = None
        self.is_initialized = False


def make_cache(config: Any, num_tokens: int | None = None) -> DynamicCache | None:
    """The cache that `generate` would make for a model, with room to grow; None if no layer is attention.

    Args:
        config: the model's.
        num_tokens: how many there will be, prompt and answer, if that is known: room for them is set aside at once.
    """
    cache = DynamicCache(config=config)
    if not any(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer(num_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def rows_can_leave(cache: DynamicCache) -> bool:
    """Whether `reorder_cache` can keep some rows of each layer; of kinds of layers not known here, it is not said."""
    return all(type(layer) in {GrowingLayer, *_LETS_ROWS_LEAVE} for layer in cache.layers)


def _append(room: Tensor | None, held: Tensor, new: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Put new tokens behind those held, in the room if they are there and it has space, else in a larger one."""
    num_held = held.shape[-2] if held.numel() else 0
    total = num_held + new.shape[-2]
    if (
        room is None
        or (num_held and not _is_in(room, held))
        or room.shape[:-2] != new.shape[:-2]
        or room.shape[-2] < total
    ):
        size = num_tokens if total <= num_tokens else total + max(total // 2, _SPARE_TOKENS)
        room = new.new_empty(*new.shape[:-2], size, new.shape[-1])
        if num_held:
            room[..., :num_held, :] = held
    room[..., num_held:total, :] = new
    return room, room[..., :total, :]


def _is_in(room: Tensor | None, held: Tensor) -> bool:
    """Whether what is held is the room's first part, and not a copy: other methods choose or repeat rows in copies."""
    return room is not None and held.numel() > 0 and held.data_ptr() == room.data_ptr()

"""Changes to one layer of a decoder, for a while: left out, or with a short window."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hybridize.importance.decoder import decoder_layers, other_forwards
from hybridize.models import attention_module, find_family

_MASKED = ("sdpa", "eager")


@contextmanager
def left_out(model: Any, layer: int, identity: Literal["mixer", "block"]) -> Iterator[None]:
    """Leave a layer out.

    Generation works as ever: the layer's cache holds nothing but counts tokens, as whoever asks the cache for its
    length may ask this layer.

    Args:
        model: a teacher or a hybrid of any family in the table.
        layer: 0-based; attention.
        identity: what is left out: the `mixer`, so that attention adds nothing to the residual stream and only the
            MLP does; or the `block`, so that the stream passes by the whole layer.
    """
    module: nn.Module = attention_module(model, layer) if identity == "mixer" else decoder_layers(model)[layer]
    cache_argument = find_family(model.config.model_type).cache

    def forward(hidden_states: Tensor, *_: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(cache_argument)
        if cache is not None:
            tick = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(tick, tick, layer)
        return hidden_states if identity == "block" else (torch.zeros_like(hidden_states), None)

    with other_forwards({module: forward}):
        yield


@contextmanager
def windowed(model: Any, layer: int, window: int) -> Iterator[None]:
    """Let a layer's attention see the last `window` tokens only, the token itself among them.

    What the layer's own mask forbids stays forbidden: later tokens, other packed documents, what is beyond a window
    of the layer's own.

    Args:
        model: a teacher or a hybrid of any family in the table, with attention `sdpa` or `eager`.
        layer: 0-based; attention.
        window: tokens.

    Raises:
        ValueError: the model's attention takes no mask.
    """
    implementation = model.config._attn_implementation
    if implementation not in _MASKED:
        raise ValueError(
            f"window: the model's attention is {implementation!r}, which takes no mask of its own for one layer; load "
            f"the model with attn_implementation {' or '.join(_MASKED)}"
        )

    def narrow(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        length = hidden_states.shape[1]
        if window >= length:
            return None
        place_L = torch.arange(length, device=hidden_states.device)
        back_LL = place_L[:, None] - place_L
        near_LL = (back_LL >= 0) & (back_LL < window)
        mask = kwargs["attention_mask"]
        if mask is None:
            if implementation == "eager":
                mask = hidden_states.new_zeros(1, 1, length, length)
            else:
                mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden_states.device)
        if mask.dtype == torch.bool:
            mask = mask & near_LL
        else:
            mask = mask.masked_fill(~near_LL, torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    handle = attention_module(model, layer).register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

"""Sliding-window attention: the teacher's own attention module, seeing the last few tokens only.

The module stays the teacher's, with all its tensors, norms, biases, rotary embedding, scale and soft-cap: only the
function that transformers' attention modules call at their heart is another one, `window_attention`, which the
module finds under the name that its own view of the config gives (see `WindowConfigMixin`). So whatever a family does
to queries and keys before, and to the result after, stays as it is.

A layer may have a sink: one learnt logit per query head that takes part in each softmax and reads nothing, in the place
of the first tokens that heads rest on and that a window hides (arXiv 2309.17453; learnt as in gpt-oss, arXiv
2508.10925). With scores s of the visible keys and the sink z, a key's weight is exp(s) / (exp(z) + sum of exp(s)).

A window layer's part of a `DynamicCache` holds the window's tokens and no more. A static cache keeps the size that
transformers gives it: the teacher's own window, or the whole sequence.

Long sequences are done in blocks of queries, each against its window's keys, so that memory grows with length times
window at most; with gradients a block is computed again in backward and nothing of its size is kept.

Legend: B batch, L queries, S keys, H query heads, G key/value heads, R = H / G query heads per group, D head width,
C queries of a block, K keys that a block sees.
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention, softmax
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from hybridize.models.configs import SLIDING, WINDOW_ATTENTION, window_config
from hybridize.models.families import find_family
from hybridize.models.growing_cache import GrowingLayer
from hybridize.spec import MixerSpec, SlidingWindowSpec

_BLOCK = 512  # queries of a block


def window_attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    mixer_starts: Tensor | None = None,
    mixer_valid_keys: Tensor | None = None,
    window_place: tuple[Any, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within `module.window` tokens, the query's own among them; the form is transformers'.

    Args:
        module: the attention module, made by `windowed`.
        query_BHLD: queries of the last L tokens, [B, H, L, D].
        key_BGSD: keys of those tokens and of what the cache remembers before them, [B, G, S, D].
        value_BGSD: their values, [B, G, S, D].
        attention_mask: made for the teacher's attention; unused, as it knows nothing of the window, and of the
            cache as this layer keeps it.
        dropout: share of the weights that are dropped.
        scaling: factor on the scores; default: 1 / sqrt(D).
        softcap: bound on the scores' size, by softcap * tanh(scores / softcap), before the softmax.
        mixer_starts: [B, L] bool, True at each packed document's first token; only where there is no cache.
        mixer_valid_keys: [B, tokens seen] bool, False at padding.
        window_place: for a cache of fixed size, the first query's place among the keys, and the number of tokens
            before the first key. Default: the queries' own keys are the last ones.
        **kwargs: what else decoder layers hand to attention; unused.

    Returns:
        [B, L, H, D], meaningless at padding; and None in the place of attention weights.
    """
    length, num_keys = query_BHLD.shape[2], key_BGSD.shape[2]
    scaling = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    first, valid_BS = num_keys - length, mixer_valid_keys
    if window_place is not None:
        first, before = window_place
        if isinstance(first, Tensor) and length > 1:
            first = int(first)
        valid_BS = None if valid_BS is None else _pad_to(valid_BS[:, before:], num_keys, right=True)
    elif valid_BS is not None:
        valid_BS = _pad_to(valid_BS[:, -num_keys:], num_keys, right=False)
    document_BL = None if mixer_starts is None else mixer_starts.cumsum(dim=1)
    sink_H = getattr(module, "sink", None)
    window: int = module.window

    plain = sink_H is None and softcap is None
    if plain and valid_BS is None and document_BL is None and length == num_keys <= window:
        out_BHLD = scaled_dot_product_attention(
            query_BHLD, key_BGSD, value_BGSD, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out_BHLD.transpose(1, 2).contiguous(), None

    low, high = 0, num_keys
    if not isinstance(first, Tensor):  # what no query sees
        low, high = max(first - window + 1, 0), first + length
    key_BGSD, value_BGSD = key_BGSD[:, :, low:high], value_BGSD[:, :, low:high]
    valid_BS = None if valid_BS is None else valid_BS[:, low:high]
    first = first - low
    attend = functools.partial(_attend, window=window, scaling=scaling, softcap=softcap, dropout=dropout)
    if length <= _BLOCK:
        masks = {"distance": first, "document_BC": document_BL, "document_BK": document_BL, "valid_BK": valid_BS}
        return attend(query_BHLD, sink_H, key_BGSD, value_BGSD, **masks), None

    # Keys and values are cut as the queries are, so that their gradients are put together in one go.
    sizes = [min(_BLOCK, length - start) for start in range(0, length, _BLOCK)]
    keys, values = (states.split([first, *sizes], dim=2) for states in (key_BGSD, value_BGSD))
    if torch.is_grad_enabled():
        attend = functools.partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=dropout > 0)
    blocks = []
    for block, query_BHCD in enumerate(query_BHLD.split(sizes, dim=2)):
        start, stop = block * _BLOCK, block * _BLOCK + sizes[block]
        low = max(first + start - window + 1, 0)
        part, skipped = (0, low) if low < first else (1 + (low - first) // _BLOCK, (low - first) % _BLOCK)
        out_BCHD = attend(
            query_BHCD,
            sink_H,
            *keys[part : block + 2],
            *values[part : block + 2],
            skipped=skipped,
            distance=first + start - low,
            document_BC=None if document_BL is None else document_BL[:, start:stop],
            document_BK=None if document_BL is None else document_BL[:, low : first + stop],
            valid_BK=None if valid_BS is None else valid_BS[:, low : first + stop],
        )
        blocks.append(out_BCHD)
    return torch.cat(blocks, dim=1), None


def _attend(
    query_BHCD: Tensor,
    sink_H: Tensor | None,
    *states_BGKD: Tensor,
    window: int,
    scaling: float,
    softcap: float | None,
    dropout: float,
    distance: Any,
    document_BC: Tensor | None,
    document_BK: Tensor | None,
    valid_BK: Tensor | None,
    skipped: int = 0,
) -> Tensor:
    """One block of queries against the keys of its windows, in parts: all parts' keys, then all parts' values.

    Of the keys the first `skipped` are left out; then number `distance` is the first query's own.

    Returns [B, C, H, D].
    """
    half = len(states_BGKD) // 2
    key_BGKD, value_BGKD = (
        (part[0] if half == 1 else torch.cat(part, dim=2))[:, :, skipped:]
        for part in (states_BGKD[:half], states_BGKD[half:])
    )
    batch, num_heads, num_queries, _ = query_BHCD.shape
    num_groups, num_keys = key_BGKD.shape[1:3]
    seen_BCK = None
    if num_queries > 1 or isinstance(distance, Tensor) or valid_BK is not None:
        place_C = torch.arange(num_queries, device=key_BGKD.device) + distance
        seen_BCK = _seen(place_C, num_keys, window, document_BC, document_BK, valid_BK)

    # A group's query heads read the same keys: they are further rows of one head. Nothing is repeated but the mask.
    rows = num_heads // num_groups * num_queries
    query_BGRD = query_BHCD.reshape(batch, num_groups, rows, -1)
    seen_B1RK = None if seen_BCK is None else seen_BCK.repeat(1, num_heads // num_groups, 1)[:, None]
    if sink_H is None and softcap is None:
        out_BGRD = scaled_dot_product_attention(
            query_BGRD, key_BGKD, value_BGKD, attn_mask=seen_B1RK, dropout_p=dropout, scale=scaling
        )
    else:
        score_BGRK = (query_BGRD @ key_BGKD.transpose(-1, -2)) * scaling
        if softcap is not None:
            score_BGRK = softcap * torch.tanh(score_BGRK / softcap)
        score_BGRK = score_BGRK.to(torch.promote_types(score_BGRK.dtype, torch.float32))
        if seen_B1RK is not None:
            score_BGRK = score_BGRK.masked_fill(~seen_B1RK, float("-inf"))
        if sink_H is not None:
            sink_GR1 = sink_H.to(score_BGRK.dtype).repeat_interleave(num_queries).view(num_groups, rows, 1)
            score_BGRK = torch.cat([score_BGRK, sink_GR1.expand(batch, -1, -1, -1)], dim=-1)
        weight_BGRK = softmax(score_BGRK, dim=-1)[..., :num_keys].to(value_BGKD.dtype)
        out_BGRD = drop(weight_BGRK, p=dropout) @ value_BGKD
    return out_BGRD.reshape(batch, num_heads, num_queries, -1).transpose(1, 2).contiguous()


def _seen(
    place_C: Tensor,
    num_keys: int,
    window: int,
    document_BC: Tensor | None,
    document_BK: Tensor | None,
    valid_BK: Tensor | None,
) -> Tensor:
    """Which keys each query sees, by its own key's number: [B or 1, C, K] bool."""
    back_CK = place_C[:, None] - torch.arange(num_keys, device=place_C.device)
    seen_BCK = ((back_CK >= 0) & (back_CK < window))[None]
    if document_BC is not None and document_BK is not None:
        seen_BCK = seen_BCK & (document_BC[:, :, None] == document_BK[:, None])
    if valid_BK is not None:  # padding sees itself, so that no row is empty
        seen_BCK = seen_BCK & (valid_BK[:, None] | (back_CK == 0))
    return seen_BCK


def _pad_to(valid_BS: Tensor, num_keys: int, right: bool) -> Tensor:
    """Lengthen a mask to all keys: on the right, where nothing is yet; or on the left, by tokens."""
    missing = num_keys - valid_BS.shape[1]
    if missing <= 0:
        return valid_BS[:, :num_keys]
    return pad(valid_BS, (0, missing) if right else (missing, 0), value=not right)


AttentionInterface.register(WINDOW_ATTENTION, window_attention)


def windowed(attention: nn.Module, config: Any, layer: int) -> nn.Module:
    """The attention module of a layer with the window that the config's layout gives it.

    Args:
        attention: the teacher's module; it stays as it is.
        config: a hybrid's, whose layout says `sliding_window` for the layer.
        layer: 0-based.

    Returns:
        A module of the same class that shares all parameters with it, and has its own sink, in fp32 and 0, if the
        spec has one. Its `spec` is the layer's, its `window` the number of tokens it sees: the spec's, or the
        teacher's own where that is smaller.
    """
    spec = config.layout.layers[layer]
    assert isinstance(spec, SlidingWindowSpec)
    family = find_family(config.model_type)
    module = copy.copy(attention)
    for name, table in vars(attention).items():
        if isinstance(table, dict):  # parameters, submodules, hooks: the tables become the twin's own
            module.__dict__[name] = table.copy()
    module.config = window_config(config)
    module.spec = spec
    module.window = window_of(spec, config, layer)
    module.num_sinks = config.num_attention_heads if spec.sink else 0
    reset_sink(module, next(attention.parameters()).device)
    module.register_forward_pre_hook(functools.partial(_see_cache, cache_argument=family.cache), with_kwargs=True)
    return module


def reset_sink(module: nn.Module, device: torch.device) -> None:
    """Give a windowed module a fresh sink, fp32 and 0, if it has one."""
    sink = None
    if module.num_sinks:
        sink = nn.Parameter(torch.zeros(module.num_sinks, dtype=torch.float32, device=device))
    module.register_parameter("sink", sink)


@torch.no_grad()
def fill_missing_sink(module: Any) -> None:
    """Set a window's sink to 0 if no checkpoint has filled it."""
    if module.sink is not None and not getattr(module.sink, "_is_hf_initialized", False):
        module.sink.zero_()
        module.sink._is_hf_initialized = True


def window_of(spec: MixerSpec, config: Any, layer: int) -> int | None:
    """How many tokens a layer's attention sees, the query's own included; None for all.

    Args:
        spec: the layer's: attention, with or without a window of its own.
        config: of a teacher or a hybrid.
        layer: 0-based.
    """
    own = None
    if find_family(config.model_type).attention_types(config)[layer] == SLIDING:
        own = config.sliding_window
    if isinstance(spec, SlidingWindowSpec):
        return spec.window if own is None else min(spec.window, own)
    return own


def _see_cache(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, cache_argument: str
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give the layer a cache of its window's size, or find its queries' place in one of fixed size."""
    cache = kwargs.get(cache_argument)
    layers: Any = getattr(cache, "layers", ())
    if module.layer_idx >= len(layers):
        return None
    layer = layers[module.layer_idx]
    if isinstance(layer, StaticLayer):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        _, before = layer.get_mask_sizes(hidden_states.shape[1])
        return args, kwargs | {"window_place": (layer.get_seq_length() - before, before)}
    if not layer.is_initialized:
        if type(layer) in (DynamicLayer, GrowingLayer):
            layers[module.layer_idx] = WindowLayer(module.window)
        elif type(layer) is DynamicSlidingWindowLayer and module.window < layer.sliding_window:
            layers[module.layer_idx] = NarrowedLayer(module.window, layer.sliding_window)
    return None


class _OfWindow(DynamicLayer):
    """A cache that keeps what the next token's window reaches, and counts all tokens."""

    is_croppable = False
    is_initialized: bool
    keys: Any
    values: Any
    cumulative_length: int
    window: int

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; return them behind those that were kept."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        whole = [
            torch.cat([kept, new], dim=-2) if kept.numel() else new
            for kept, new in ((self.keys, key_states), (self.values, value_states))
        ]
        self.keys, self.values = (self._last(states) for states in whole)
        return whole[0], whole[1]

    def _last(self, states: Tensor) -> Tensor:
        surplus = states.shape[-2] - self.window + 1
        if surplus <= 0:
            return states
        last = states[..., surplus:, :]
        return last.clone() if surplus > self.window else last  # a view would keep a long prompt's states alive

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raise a `ValueError`, unless there is nothing to do: what has left the window cannot come back."""
        if tokens_to_remove:
            raise ValueError(
                f"crop: a cache of a window of {self.window} tokens cannot be rolled back by {-tokens_to_remove}; "
                "start from an empty cache"
            )


class WindowLayer(_OfWindow):
    """The cache of a window over full attention.

    To whoever makes masks for the model's layers of full attention it answers as their caches do.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.cumulative_length = 0


class NarrowedLayer(_OfWindow, DynamicSlidingWindowLayer):
    """The cache of a window over the teacher's own, wider one.

    To whoever makes masks for the model's layers that slide it answers as their caches do.
    """

    def __init__(self, window: int, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.window = window

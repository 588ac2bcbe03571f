"""Checks of what is handed to an op with a delta rule, for sequences and for steps.

Legend: B batch, L length, H heads, G groups of heads, K width of queries and keys, V width of values.
"""

import torch
from torch import Tensor


def check_sequences(
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGV: Tensor,
    g: tuple[str, Tensor],
    beta_BLH: Tensor,
    starts_BL: Tensor | None,
    initial_state_BHKV: Tensor | None,
    per_channel: bool,
) -> None:
    """Check the inputs of whole sequences.

    Args:
        q_BLHK: queries.
        k_BLGK: keys.
        v_BLGV: values.
        g: name and tensor of the decays' logarithms.
        beta_BLH: strengths of writing.
        starts_BL: first tokens.
        initial_state_BHKV: state before the first token.
        per_channel: whether there is a decay for every channel of the keys.

    Raises:
        ValueError: a shape or a dtype does not fit; names the argument, the value, the remedy.
    """
    if q_BLHK.ndim != 4 or q_BLHK.numel() == 0:
        raise ValueError(f"q_BLHK: shape {tuple(q_BLHK.shape)}; pass [batch, length, heads, width], none of them zero")
    if not q_BLHK.is_floating_point():
        raise ValueError(f"q_BLHK: dtype {q_BLHK.dtype} is not a float; pass fp32, bf16, fp16 or fp64")
    batch, length, num_heads, key_width = q_BLHK.shape
    leading = (batch, length)
    _check_groups(("k_BLGK", k_BLGK), ("v_BLGV", v_BLGV), leading, num_heads, key_width)
    _check_shape(*g, (*leading, num_heads, key_width) if per_channel else (*leading, num_heads))
    _check_shape("beta_BLH", beta_BLH, (*leading, num_heads))
    _check_shape("initial_state_BHKV", initial_state_BHKV, (batch, num_heads, key_width, v_BLGV.shape[-1]))
    _check_shape("starts_BL", starts_BL, leading)
    if starts_BL is not None and starts_BL.dtype != torch.bool:
        raise ValueError(f"starts_BL: dtype {starts_BL.dtype}; pass a bool tensor, True at each first token")


def check_step(
    state_BHKV: Tensor | None,
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    g: tuple[str, Tensor],
    beta: tuple[str, Tensor],
    per_channel: bool,
) -> None:
    """Check the inputs of one step, as `check_sequences` does.

    Raises:
        ValueError: a shape does not fit; names the argument, the value, the remedy.
    """
    if q_BHK.ndim != 3:
        raise ValueError(f"q_BHK: shape {tuple(q_BHK.shape)}; pass [batch, heads, width]")
    batch, num_heads, key_width = q_BHK.shape
    _check_groups(("k_BGK", k_BGK), ("v_BGV", v_BGV), (batch,), num_heads, key_width)
    _check_shape(*g, (batch, num_heads, key_width) if per_channel else (batch, num_heads))
    _check_shape(*beta, (batch, num_heads))
    _check_shape("state_BHKV", state_BHKV, (batch, num_heads, key_width, v_BGV.shape[-1]))


def _check_groups(
    k: tuple[str, Tensor], v: tuple[str, Tensor], leading: tuple[int, ...], num_heads: int, key_width: int
) -> None:
    num_groups = k[1].shape[-2] if k[1].ndim > 1 else 0
    if num_groups == 0 or num_heads % num_groups:
        raise ValueError(f"{k[0]}: {num_groups} groups do not divide {num_heads} heads; use a divisor")
    _check_shape(*k, (*leading, num_groups, key_width))
    _check_shape(*v, (*leading, num_groups, v[1].shape[-1]))


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; pass {list(shape)}, to go with the queries and groups")

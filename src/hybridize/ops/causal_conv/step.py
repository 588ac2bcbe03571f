"""One token of the causal convolution per sequence, by a window handed over or by one that lies in a pool.

Legend: B batch, X channels of the input, D channels of the output, K taps, W inputs of a pooled window, M slots of a
pool.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from hybridize.ops.causal_conv.checks import check_convolution, check_window
from hybridize.ops.causal_conv.shifted import repeat_blocks
from hybridize.ops.launch import is_learning, takes_kernel
from hybridize.ops.slots import check_pool, read_slots, write_slots, zero_null_rows


def causal_conv_step(
    window_BDK: Tensor,
    x_BX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
    *,
    repeat: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve one token per sequence.

    Args:
        window_BDK: the K inputs before the token, [B, D, K], oldest first; left as it is.
        x_BX: the token's input, [B, X].
        weight_DK: taps, [D, K].
        bias_D: added to the sum, [D].
        activation: "silu" or None.
        repeat: as for `causal_conv`.

    Returns:
        y [B, D] in x's dtype, and the window with the token in it, [B, D, K] in x's dtype.

    Raises:
        ValueError: a shape or an option does not fit; names the argument, the value, the remedy.
    """
    times = check_convolution(x_BX.shape, weight_DK, bias_D, activation, repeat)
    check_window(window_BDK, (x_BX.shape[0], *weight_DK.shape))
    width = x_BX.shape[1] if repeat is None else repeat[0]
    if takes_kernel(x_BX) and x_BX.shape[0] and not is_learning(window_BDK, x_BX, weight_DK, bias_D):
        from hybridize.ops.causal_conv.triton_step import step_triton

        return step_triton(window_BDK, x_BX, weight_DK, bias_D, activation == "silu", width, times)
    dtype = torch.promote_types(x_BX.dtype, torch.float32)
    x_BD = x_BX if repeat is None else repeat_blocks(x_BX, repeat)
    window_BDK = torch.cat([window_BDK[..., 1:].to(x_BX.dtype), x_BD.unsqueeze(-1)], dim=-1)
    y_BD = (window_BDK * weight_DK.to(dtype)).sum(dim=-1)
    if bias_D is not None:
        y_BD = y_BD + bias_D.to(dtype)
    return (silu(y_BD) if activation == "silu" else y_BD).to(x_BX.dtype), window_BDK


@torch.no_grad()
def causal_conv_step_in_place(
    pool_MDW: Tensor,
    slot_B: Tensor | None,
    x_BX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
    *,
    repeat: tuple[int, int] | None = None,
    null_slot: int | None = None,
) -> Tensor:
    """Convolve one token per sequence, and shift its window where it lies; see `hybridize.ops.slots`. No gradients.

    Args:
        pool_MDW: windows, [M, D, W], oldest first, in any float dtype: W is K, or K - 1, since the oldest of K inputs
            is out of reach of what comes next.
        slot_B: where each sequence has its window, int32 or int64; None: sequence b in slot b.
        x_BX: the token's input, [B, X].
        weight_DK: taps, [D, K].
        bias_D: added to the sum, [D].
        activation: "silu" or None.
        repeat: as for `causal_conv`.
        null_slot: the slot that stands for no sequence, if there is one.

    Returns:
        y [B, D] in x's dtype, zero where the slot is the null slot.

    Raises:
        ValueError: a shape or an option does not fit; names the argument, the value, the remedy.
    """
    times = check_convolution(x_BX.shape, weight_DK, bias_D, activation, repeat)
    num_channels, num_taps = weight_DK.shape
    if pool_MDW.ndim != 3 or pool_MDW.shape[2] not in (num_taps - 1, num_taps):
        expected = f"[slots, {num_channels}, {num_taps - 1} or {num_taps}]"
        raise ValueError(f"pool_MDW: shape {tuple(pool_MDW.shape)}; pass {expected}, to go with the taps")
    check_pool("pool_MDW", pool_MDW, (num_channels, pool_MDW.shape[2]), slot_B, x_BX.shape[0], null_slot)
    width = x_BX.shape[1] if repeat is None else repeat[0]
    if takes_kernel(x_BX) and x_BX.shape[0]:
        from hybridize.ops.causal_conv.triton_step import step_in_place_triton

        silu_too = activation == "silu"
        return step_in_place_triton(pool_MDW, slot_B, x_BX, weight_DK, bias_D, silu_too, width, times, null_slot)
    window_BDW = read_slots(pool_MDW, slot_B, x_BX.shape[0])
    window_BDK = pad(window_BDW, (num_taps - pool_MDW.shape[2], 0))
    y_BD, window_BDK = causal_conv_step(window_BDK, x_BX, weight_DK, bias_D, activation, repeat=repeat)
    write_slots(pool_MDW, slot_B, window_BDK[..., num_taps - pool_MDW.shape[2] :], null_slot)
    return zero_null_rows(y_BD, slot_B, null_slot)

"""One token of the causal convolution on a GPU: the windows of a pool are read once and shifted where they lie.

Legend: B batch, X channels of the input, D channels of the output, K taps, W inputs of a window (W >= K - 1), M slots
of a pool; in the kernel C channels of a program.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridize.ops.launch import contiguous_rows, on_its_device
from hybridize.ops.selective_scan.triton_parts import sigmoid

# Channels of a program, and its warps.
_CHANNELS, _WARPS = 512, 4


@triton.jit
def _step_kernel(
    pool_ptr, slot_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, null_slot, num_channels, pool_stride, x_stride,
    WIDTH: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr, W: tl.constexpr, HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    channel_C = tl.program_id(0) * C + tl.arange(0, C)
    valid_C = channel_C < num_channels
    y_ptr += row * num_channels
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slot_ptr + row).to(tl.int64)
        if slot == null_slot:
            tl.store(y_ptr + channel_C, tl.zeros([C], y_ptr.dtype.element_ty), mask=valid_C)
            return
    window_ptr = pool_ptr + slot * pool_stride + channel_C * W
    from_C = channel_C // (WIDTH * TIMES) * WIDTH + channel_C % WIDTH
    new_C = tl.load(x_ptr + row * x_stride + from_C, mask=valid_C, other=0.0)
    last_tap_C = tl.load(weight_ptr + channel_C * K + (K - 1), mask=valid_C, other=0.0).to(tl.float32)
    sum_C = new_C.to(tl.float32) * last_tap_C
    if HAS_BIAS:
        sum_C += tl.load(bias_ptr + channel_C, mask=valid_C, other=0.0).to(tl.float32)
    for place in tl.static_range(W):
        input_C = tl.load(window_ptr + place, mask=valid_C, other=0.0)
        if place > 0:
            # Whichever thread overwrites a place, all have read it.
            tl.debug_barrier()
            tl.store(window_ptr + place - 1, input_C, mask=valid_C)
        if place >= W - (K - 1):
            tap_C = tl.load(weight_ptr + channel_C * K + (place - (W - (K - 1))), mask=valid_C, other=0.0)
            sum_C += input_C.to(tl.float32) * tap_C.to(tl.float32)
    if W > 0:
        tl.debug_barrier()
        tl.store(window_ptr + (W - 1), new_C.to(pool_ptr.dtype.element_ty), mask=valid_C)
    if SILU:
        sum_C *= sigmoid(sum_C)
    tl.store(y_ptr + channel_C, sum_C.to(y_ptr.dtype.element_ty), mask=valid_C)


@on_its_device
def step_in_place_triton(
    pool_MDW: Tensor,
    slot_B: Tensor | None,
    x_BX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    silu: bool,
    width: int,
    times: int,
    null_slot: int | None,
) -> Tensor:
    """Convolve one token of some sequences; the arguments are those of `causal_conv_step_in_place`, checked.

    Returns:
        y [B, D] in x's dtype.
    """
    x_BX, weight_DK = contiguous_rows(x_BX), weight_DK.contiguous()
    bias_D = None if bias_D is None else bias_D.contiguous()
    batch, (num_channels, num_taps) = x_BX.shape[0], weight_DK.shape
    y_BD = x_BX.new_empty(batch, num_channels)
    _step_kernel[(triton.cdiv(num_channels, _CHANNELS), batch)](
        pool_MDW, x_BX if slot_B is None else slot_B.contiguous(), x_BX, weight_DK,
        weight_DK if bias_D is None else bias_D, y_BD, -1 if null_slot is None else null_slot, num_channels,
        pool_MDW.stride(0), x_BX.stride(0), WIDTH=width, TIMES=times, K=num_taps, W=pool_MDW.shape[2],
        HAS_SLOTS=slot_B is not None, HAS_BIAS=bias_D is not None, SILU=silu,
        C=_CHANNELS, num_warps=_WARPS,
    )  # fmt: skip
    return y_BD


@torch.library.custom_op("hybridize::causal_conv_step", mutates_args=())
def step_triton(
    window_BDK: Tensor, x_BX: Tensor, weight_DK: Tensor, bias_D: Tensor | None, silu: bool, width: int, times: int
) -> tuple[Tensor, Tensor]:
    """Convolve one token per sequence; the arguments are those of `causal_conv_step`, checked.

    Returns:
        y [B, D] and the window with the token in it, [B, D, K], both in x's dtype.
    """
    new_BDK = window_BDK.to(x_BX.dtype, copy=True, memory_format=torch.contiguous_format)
    return step_in_place_triton(new_BDK, None, x_BX, weight_DK, bias_D, silu, width, times, None), new_BDK


@step_triton.register_fake
def _(
    window_BDK: Tensor, x_BX: Tensor, weight_DK: Tensor, bias_D: Tensor | None, silu: bool, width: int, times: int
) -> tuple[Tensor, Tensor]:
    return x_BX.new_empty(x_BX.shape[0], weight_DK.shape[0]), x_BX.new_empty(window_BDK.shape)

"""The causal depthwise convolution on a GPU: one Triton kernel each way behind a PyTorch operator.

A program makes a tile of tokens and channels; the taps read the same tile shifted by a token each, which the cache
serves. Repeated channels are computed from one read of their input. The backward recomputes the sums before the
activation, so nothing but the inputs is kept, and adds in a fixed order, so it gives the same bits every time; it
holds the gradient of those sums once, in the dtype of x.

Legend: B batch, L length, X channels of the input, D channels of the output, K taps; in a kernel T tokens, C channels
of the input.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from hybridize.ops.causal_conv.shifted import with_window
from hybridize.ops.launch import on_its_device

# Whether the kernels run on a CPU, in Triton's interpreter; settled when they are defined.
_INTERPRETED = triton.knobs.runtime.interpret
# Of a program's tile.
_TOKENS, _CHANNELS = 64, 64


@triton.jit
def _tap_valid(starts_ptr, token_T, length, BACK: tl.constexpr, HAS_STARTS: tl.constexpr):
    """Whether the token BACK before each one exists and is of the same document."""
    valid_T = (token_T >= BACK) & (token_T < length)
    if HAS_STARTS:
        for step in tl.static_range(BACK):
            starts_T = tl.load(starts_ptr + token_T - step, mask=(token_T >= step) & (token_T < length), other=0)
            valid_T = valid_T & (starts_T == 0)
    return valid_T


@triton.jit
def _load_tap(x_ptr, token_T, valid_T, stride_t, channel_C, valid_C, BACK: tl.constexpr):
    mask_TC = valid_T[:, None] & valid_C[None, :]
    offset_TC = (token_T - BACK).to(tl.int64)[:, None] * stride_t + channel_C[None, :]
    return tl.load(x_ptr + offset_TC, mask=mask_TC, other=0.0)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, starts_ptr, y_ptr,
    length, num_inputs, x_stride_b, x_stride_t,
    WIDTH: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STARTS: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1)
    token_T = first * T + tl.arange(0, T)
    input_C = tl.program_id(0) * C + tl.arange(0, C)
    valid_C = input_C < num_inputs
    x_ptr += row * x_stride_b
    starts_ptr += row * length
    y_ptr += row * length * num_inputs * TIMES
    for repetition in tl.static_range(TIMES):
        output_C = (input_C // WIDTH * TIMES + repetition) * WIDTH + input_C % WIDTH
        sum_TC = tl.zeros([T, C], tl.float32)
        if HAS_BIAS:
            sum_TC += tl.load(bias_ptr + output_C, mask=valid_C, other=0.0).to(tl.float32)[None, :]
        for back in tl.static_range(K):
            tap_valid_T = _tap_valid(starts_ptr, token_T, length, back, HAS_STARTS)
            x_TC = _load_tap(x_ptr, token_T, tap_valid_T, x_stride_t, input_C, valid_C, back).to(tl.float32)
            tap_C = tl.load(weight_ptr + output_C * K + (K - 1 - back), mask=valid_C, other=0.0).to(tl.float32)
            sum_TC += x_TC * tap_C[None, :]
        if SILU:
            sum_TC = sum_TC / (1.0 + tl.exp(-sum_TC))
        mask_TC = (token_T < length)[:, None] & valid_C[None, :]
        offset_TC = token_T.to(tl.int64)[:, None] * (num_inputs * TIMES) + output_C[None, :]
        tl.store(y_ptr + offset_TC, sum_TC.to(y_ptr.dtype.element_ty), mask=mask_TC)


@triton.jit
def _sum_grad_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, starts_ptr,
    dsum_ptr,  # [B, L, D]: the gradient of the sums
    dweight_ptr, dbias_ptr,  # in parts: [B x tiles of tokens, D, K] and [B x tiles, D]
    length, num_inputs, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t,
    WIDTH: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STARTS: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1)
    token_T = first * T + tl.arange(0, T)
    exists_T = token_T < length
    output_C = tl.program_id(0) * C + tl.arange(0, C)
    valid_C = output_C < num_inputs * TIMES
    input_C = output_C // (WIDTH * TIMES) * WIDTH + output_C % WIDTH
    x_ptr += row * x_stride_b
    starts_ptr += row * length
    part = (row * tl.num_programs(1) + first) * num_inputs * TIMES
    dsum_TC = _load_tap(dy_ptr + row * dy_stride_b, token_T, exists_T, dy_stride_t, output_C, valid_C, 0).to(tl.float32)
    if SILU:
        sum_TC = tl.zeros([T, C], tl.float32)
        if HAS_BIAS:
            sum_TC += tl.load(bias_ptr + output_C, mask=valid_C, other=0.0).to(tl.float32)[None, :]
        for back in tl.static_range(K):
            tap_valid_T = _tap_valid(starts_ptr, token_T, length, back, HAS_STARTS)
            x_TC = _load_tap(x_ptr, token_T, tap_valid_T, x_stride_t, input_C, valid_C, back).to(tl.float32)
            tap_C = tl.load(weight_ptr + output_C * K + (K - 1 - back), mask=valid_C, other=0.0)
            sum_TC += x_TC * tap_C.to(tl.float32)[None, :]
        gate_TC = 1.0 / (1.0 + tl.exp(-sum_TC))
        dsum_TC *= gate_TC * (1.0 + sum_TC * (1.0 - gate_TC))
    mask_TC = exists_T[:, None] & valid_C[None, :]
    offset_TC = (row * length + token_T)[:, None] * (num_inputs * TIMES) + output_C[None, :]
    tl.store(dsum_ptr + offset_TC, dsum_TC.to(dsum_ptr.dtype.element_ty), mask=mask_TC)
    if HAS_BIAS:
        tl.store(dbias_ptr + part + output_C, tl.sum(dsum_TC, axis=0), mask=valid_C)
    for back in tl.static_range(K):
        tap_valid_T = _tap_valid(starts_ptr, token_T, length, back, HAS_STARTS)
        x_TC = _load_tap(x_ptr, token_T, tap_valid_T, x_stride_t, input_C, valid_C, back).to(tl.float32)
        dtap_C = tl.sum(dsum_TC * x_TC, axis=0)
        tl.store(dweight_ptr + (part + output_C) * K + (K - 1 - back), dtap_C, mask=valid_C)


@triton.jit
def _input_grad_kernel(
    dsum_ptr, weight_ptr, starts_ptr, dx_ptr, length, num_inputs,
    WIDTH: tl.constexpr, TIMES: tl.constexpr, K: tl.constexpr,
    HAS_STARTS: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    token_T = tl.program_id(1) * T + tl.arange(0, T)
    input_C = tl.program_id(0) * C + tl.arange(0, C)
    valid_C = input_C < num_inputs
    dsum_ptr += row * length * num_inputs * TIMES
    starts_ptr += row * length
    dx_TC = tl.zeros([T, C], tl.float32)
    for ahead in tl.static_range(K):
        # The sum at the token `ahead` after each one, which met it with the tap K - 1 - ahead.
        later_T = token_T + ahead
        met_T = _tap_valid(starts_ptr, later_T, length, ahead, HAS_STARTS)
        mask_TC = met_T[:, None] & valid_C[None, :]
        for repetition in tl.static_range(TIMES):
            output_C = (input_C // WIDTH * TIMES + repetition) * WIDTH + input_C % WIDTH
            offset_TC = later_T.to(tl.int64)[:, None] * (num_inputs * TIMES) + output_C[None, :]
            dsum_TC = tl.load(dsum_ptr + offset_TC, mask=mask_TC, other=0.0).to(tl.float32)
            tap_C = tl.load(weight_ptr + output_C * K + (K - 1 - ahead), mask=valid_C, other=0.0).to(tl.float32)
            dx_TC += dsum_TC * tap_C[None, :]
    mask_TC = (token_T < length)[:, None] & valid_C[None, :]
    offset_TC = (row * length + token_T)[:, None] * num_inputs + input_C[None, :]
    tl.store(dx_ptr + offset_TC, dx_TC.to(dx_ptr.dtype.element_ty), mask=mask_TC)


def _grid(batch: int, length: int, num_channels: int) -> tuple[int, int, int]:
    return triton.cdiv(num_channels, _CHANNELS), triton.cdiv(length, _TOKENS), batch


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("hybridize::causal_conv", mutates_args=())
@on_its_device
def _conv(
    x_BLX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    starts_BL: Tensor | None,
    silu: bool,
    width: int,
    times: int,
) -> Tensor:
    batch, length, num_inputs = x_BLX.shape
    x_BLX, weight_DK = _last_contiguous(x_BLX), weight_DK.contiguous()
    bias_D = None if bias_D is None else bias_D.contiguous()
    y_BLD = x_BLX.new_empty(batch, length, num_inputs * times)
    _forward_kernel[_grid(batch, length, num_inputs)](
        x_BLX, weight_DK, weight_DK if bias_D is None else bias_D,
        weight_DK if starts_BL is None else starts_BL.contiguous(), y_BLD,
        length, num_inputs, x_BLX.stride(0), x_BLX.stride(1), WIDTH=width, TIMES=times, K=weight_DK.shape[1],
        HAS_BIAS=bias_D is not None, HAS_STARTS=starts_BL is not None, SILU=silu, T=_TOKENS, C=_CHANNELS,
    )  # fmt: skip
    return y_BLD


@_conv.register_fake
def _(
    x_BLX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    starts_BL: Tensor | None,
    silu: bool,
    width: int,
    times: int,
) -> Tensor:
    return x_BLX.new_empty(*x_BLX.shape[:2], x_BLX.shape[2] * times)


@torch.library.custom_op("hybridize::causal_conv_backward", mutates_args=())
@on_its_device
def _conv_backward(
    dy_BLD: Tensor,
    x_BLX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    starts_BL: Tensor | None,
    silu: bool,
    width: int,
    times: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, num_inputs = x_BLX.shape
    dy_BLD, x_BLX, weight_DK = _last_contiguous(dy_BLD), _last_contiguous(x_BLX), weight_DK.contiguous()
    bias_D = None if bias_D is None else bias_D.contiguous()
    starts = weight_DK if starts_BL is None else starts_BL.contiguous()
    grid = _grid(batch, length, num_inputs * times)
    dsum_BLD = x_BLX.new_empty(batch, length, num_inputs * times)
    dweight = weight_DK.new_empty(batch * grid[1], *weight_DK.shape, dtype=torch.float32)
    dbias = dweight.new_empty(batch * grid[1], 0 if bias_D is None else weight_DK.shape[0])
    _sum_grad_kernel[grid](
        dy_BLD, x_BLX, weight_DK, weight_DK if bias_D is None else bias_D, starts, dsum_BLD, dweight, dbias,
        length, num_inputs, dy_BLD.stride(0), dy_BLD.stride(1), x_BLX.stride(0), x_BLX.stride(1),
        WIDTH=width, TIMES=times, K=weight_DK.shape[1],
        HAS_BIAS=bias_D is not None, HAS_STARTS=starts_BL is not None, SILU=silu, T=_TOKENS, C=_CHANNELS,
    )  # fmt: skip
    dx_BLX = x_BLX.new_empty(batch, length, num_inputs)
    _input_grad_kernel[_grid(batch, length, num_inputs)](
        dsum_BLD, weight_DK, starts, dx_BLX, length, num_inputs, WIDTH=width, TIMES=times, K=weight_DK.shape[1],
        HAS_STARTS=starts_BL is not None, T=_TOKENS, C=_CHANNELS,
    )  # fmt: skip
    bias_dtype = weight_DK.dtype if bias_D is None else bias_D.dtype
    return dx_BLX, dweight.sum(dim=0).to(weight_DK.dtype), dbias.sum(dim=0).to(bias_dtype)


@_conv_backward.register_fake
def _(
    dy_BLD: Tensor,
    x_BLX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    starts_BL: Tensor | None,
    silu: bool,
    width: int,
    times: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight_DK.new_empty(0) if bias_D is None else bias_D.new_empty(bias_D.shape)
    return x_BLX.new_empty(x_BLX.shape), weight_DK.new_empty(weight_DK.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_BLX, weight_DK, bias_D, starts_BL, *ctx.options = inputs
    ctx.save_for_backward(x_BLX, weight_DK, bias_D, starts_BL)


def _backward(ctx: Any, dy_BLD: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing gives them out no more often
    dx_BLX, dweight_DK, dbias_D = _conv_backward(dy_BLD, *saved, *ctx.options)
    return dx_BLX, dweight_DK, None if saved[2] is None else dbias_D, None, None, None, None


_conv.register_autograd(_backward, setup_context=_setup_context)


def causal_conv_triton(
    x_BLX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    activation: str | None,
    repeat: tuple[int, int],
    starts_BL: Tensor | None,
    window_BDK: Tensor | None,
) -> Tensor:
    """Convolve on a GPU, with sums in fp32.

    The arguments are those of `hybridize.ops.causal_conv.causal_conv`, already checked, with `repeat` always given.

    Returns:
        y of shape [B, L, D] in x's dtype.

    Raises:
        ValueError: x is in fp64, or not on a GPU (and Triton's interpreter is off).
    """
    if not x_BLX.is_cuda and not _INTERPRETED:
        raise ValueError(f"x_BLX: on {x_BLX.device}; the triton backend needs a GPU, use backend='shifted'")
    if x_BLX.dtype == torch.float64:
        raise ValueError("x_BLX: dtype torch.float64; the triton backend computes in fp32, use backend='shifted'")
    silu = activation == "silu"
    if window_BDK is None:
        return _conv(x_BLX, weight_DK, bias_D, starts_BL, silu, *repeat)
    num_taps = weight_DK.shape[1]
    if starts_BL is not None:
        starts_BL = pad(starts_BL, (num_taps, 0))
    past_BLX = with_window(x_BLX, window_BDK, num_taps, repeat)
    return _conv(past_BLX, weight_DK, bias_D, starts_BL, silu, *repeat)[:, num_taps:]

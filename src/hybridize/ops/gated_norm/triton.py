"""The norm and gate on a GPU: one pass over x and the gate, for inference alone.

Legend: N rows, D channels, W channels of a head, H heads; in the kernel H heads of a program, W padded.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridize.ops.launch import on_its_device
from hybridize.ops.selective_scan.triton_parts import sigmoid

# Channels of a program.
_BLOCK_NUMEL = 2048


@triton.jit
def _kernel(
    x_ptr, gate_ptr, bias_ptr, weight_ptr, y_ptr, eps, x_stride, gate_stride,
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, PER_HEAD: tl.constexpr, SILU: tl.constexpr, GATE_FIRST: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    num_blocks: tl.constexpr = (NUM_HEADS + H - 1) // H
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    head_H = tl.program_id(0) % num_blocks * H + tl.arange(0, H)
    channel_W = tl.arange(0, W)
    offset_HW = head_H[:, None] * WIDTH + channel_W[None, :]
    valid_HW = (head_H < NUM_HEADS)[:, None] & (channel_W < WIDTH)[None, :]
    value_HW = tl.load(x_ptr + row * x_stride + offset_HW, mask=valid_HW, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate_HW = tl.load(gate_ptr + row * gate_stride + offset_HW, mask=valid_HW, other=0.0).to(tl.float32)
        if HAS_BIAS:
            gate_HW += tl.load(bias_ptr + offset_HW, mask=valid_HW, other=0.0).to(tl.float32)
        factor_HW = sigmoid(gate_HW)
        if SILU:
            factor_HW *= gate_HW
        if GATE_FIRST:
            value_HW *= factor_HW
    if HAS_NORM:
        mean_H = tl.sum(value_HW * value_HW, axis=1) / WIDTH
        value_HW *= tl.rsqrt(mean_H + eps)[:, None]
        if PER_HEAD:
            value_HW *= tl.load(weight_ptr + offset_HW, mask=valid_HW, other=0.0).to(tl.float32)
        else:
            value_HW *= tl.load(weight_ptr + channel_W, mask=channel_W < WIDTH, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE and not GATE_FIRST:
        value_HW *= factor_HW
    y_offset_HW = row * (NUM_HEADS * WIDTH) + offset_HW
    tl.store(y_ptr + y_offset_HW, value_HW.to(y_ptr.dtype.element_ty), mask=valid_HW)


def _rows(tensor_ND: Tensor) -> Tensor:
    rows = tensor_ND.reshape(-1, tensor_ND.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@torch.library.custom_op("hybridize::gated_norm", mutates_args=())
@on_its_device
def gated_norm_triton(
    x_ND: Tensor,
    gate_ND: Tensor | None,
    gate_bias_D: Tensor | None,
    norm_weight: Tensor | None,
    silu: bool,
    width: int,
    eps: float,
    gate_first: bool,
) -> Tensor:
    """Normalise and gate on a GPU, in fp32; the arguments are those of `gated_norm`, checked, of some rows.

    Returns:
        [..., D], in x's dtype.
    """
    x, gate = _rows(x_ND), None if gate_ND is None else _rows(gate_ND)
    bias, weight = (None if t is None else t.contiguous() for t in (gate_bias_D, norm_weight))
    num_heads, padded = x.shape[1] // width, triton.next_power_of_2(width)
    heads = max(1, min(triton.next_power_of_2(num_heads), _BLOCK_NUMEL // padded))
    y_ND = x.new_empty(x_ND.shape)
    _kernel[(x.shape[0] * triton.cdiv(num_heads, heads),)](
        x, x if gate is None else gate, x if bias is None else bias, x if weight is None else weight, y_ND,
        eps, x.stride(0), 0 if gate is None else gate.stride(0), NUM_HEADS=num_heads, WIDTH=width,
        HAS_GATE=gate is not None, HAS_BIAS=bias is not None, HAS_NORM=weight is not None,
        PER_HEAD=weight is not None and weight.numel() > width, SILU=silu, GATE_FIRST=gate_first, H=heads, W=padded,
    )  # fmt: skip
    return y_ND


@gated_norm_triton.register_fake
def _(
    x_ND: Tensor,
    gate_ND: Tensor | None,
    gate_bias_D: Tensor | None,
    norm_weight: Tensor | None,
    silu: bool,
    width: int,
    eps: float,
    gate_first: bool,
) -> Tensor:
    return x_ND.new_empty(x_ND.shape)

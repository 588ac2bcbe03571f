"""The decode step on a GPU: one pass over the state, which is nearly all there is to read and write.

Legend: B batch, D channels, N states per channel, H heads, G groups of heads; in the kernel C channels of a program.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridize.ops.launch import on_its_device
from hybridize.ops.selective_scan.triton_parts import decay_rates, sigmoid, softplus

# Numbers of a program's share of the state.
_BLOCK_NUMEL = 2048


@triton.jit
def _step_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, z_ptr, y_ptr, new_state_ptr,
    num_channels, x_stride, dt_stride, B_stride, C_stride, z_stride,
    N: tl.constexpr, NUM_STATES: tl.constexpr, PER_HEAD: tl.constexpr, PER_GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    channel_C = tl.program_id(0) * C + tl.arange(0, C)
    valid_C = channel_C < num_channels
    state_N = tl.arange(0, N)
    valid_CN = valid_C[:, None] & (state_N < NUM_STATES)[None, :]
    offset_CN = channel_C[:, None] * NUM_STATES + state_N[None, :]
    state_ptr += row * num_channels * NUM_STATES
    new_state_ptr += row * num_channels * NUM_STATES
    state_CN = tl.load(state_ptr + offset_CN, mask=valid_CN, other=0.0).to(tl.float32)
    A_CN = decay_rates(tl.load(A_ptr + offset_CN, mask=valid_CN, other=0.0))
    group_offset_CN = (channel_C // PER_GROUP * NUM_STATES)[:, None] + state_N[None, :]
    head_offset_CN = (channel_C // PER_HEAD * NUM_STATES)[:, None] + state_N[None, :]
    B_CN = tl.load(B_ptr + row * B_stride + group_offset_CN, mask=valid_CN, other=0.0).to(tl.float32)
    C_CN = tl.load(C_ptr + row * C_stride + head_offset_CN, mask=valid_CN, other=0.0).to(tl.float32)
    x_C = tl.load(x_ptr + row * x_stride + channel_C, mask=valid_C, other=0.0).to(tl.float32)
    delta_C = tl.load(dt_ptr + row * dt_stride + channel_C, mask=valid_C, other=0.0).to(tl.float32)
    if HAS_BIAS:
        delta_C += tl.load(bias_ptr + channel_C, mask=valid_C, other=0.0)
    if SOFTPLUS:
        delta_C = softplus(delta_C)
    state_CN = tl.exp2(delta_C[:, None] * A_CN) * state_CN + (delta_C * x_C)[:, None] * B_CN
    tl.store(new_state_ptr + offset_CN, state_CN, mask=valid_CN)
    y_C = tl.sum(state_CN * C_CN, axis=1)
    if HAS_D:
        y_C += tl.load(D_ptr + channel_C, mask=valid_C, other=0.0) * x_C
    if HAS_Z:
        z_C = tl.load(z_ptr + row * z_stride + channel_C, mask=valid_C, other=0.0).to(tl.float32)
        y_C *= z_C * sigmoid(z_C)
    tl.store(y_ptr + row * num_channels + channel_C, y_C.to(y_ptr.dtype.element_ty), mask=valid_C)


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """Make all axes but the first contiguous."""
    return tensor if tensor[0].is_contiguous() else tensor.contiguous()


@torch.library.custom_op("hybridize::selective_scan_step", mutates_args=())
@on_its_device
def selective_scan_step_triton(
    state_BDN: Tensor,
    x_BD: Tensor,
    dt_BD: Tensor,
    A_DN: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    D_D: Tensor | None,
    dt_bias_D: Tensor | None,
    z_BD: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token on a GPU, in fp32; the arguments are those of `selective_scan_step`, checked.

    Returns:
        y [B, D] in x's dtype, and the new state [B, D, N] in fp32.
    """
    (batch, num_channels), num_states = x_BD.shape, A_DN.shape[1]
    A_DN, D_D, dt_bias_D = (None if t is None else t.float().contiguous() for t in (A_DN, D_D, dt_bias_D))
    state_BDN = state_BDN.contiguous()
    x_BD, dt_BD, B_BGN, C_BHN = (_contiguous_rows(t) for t in (x_BD, dt_BD, B_BGN, C_BHN))
    z_BD = None if z_BD is None else _contiguous_rows(z_BD)
    y_BD = x_BD.new_empty(batch, num_channels)
    new_state_BDN = state_BDN.new_empty(batch, num_channels, num_states, dtype=torch.float32)
    padded_states = triton.next_power_of_2(num_states)
    block = max(1, min(triton.next_power_of_2(num_channels), _BLOCK_NUMEL // padded_states))
    _step_kernel[(triton.cdiv(num_channels, block), batch)](
        state_BDN, x_BD, dt_BD, A_DN, B_BGN, C_BHN, A_DN if D_D is None else D_D,
        A_DN if dt_bias_D is None else dt_bias_D, x_BD if z_BD is None else z_BD, y_BD, new_state_BDN,
        num_channels, x_BD.stride(0), dt_BD.stride(0), B_BGN.stride(0), C_BHN.stride(0),
        0 if z_BD is None else z_BD.stride(0),
        N=padded_states, NUM_STATES=num_states, PER_HEAD=num_channels // C_BHN.shape[1],
        PER_GROUP=num_channels // B_BGN.shape[1], SOFTPLUS=dt_softplus, HAS_D=D_D is not None,
        HAS_BIAS=dt_bias_D is not None, HAS_Z=z_BD is not None, C=block,
    )  # fmt: skip
    return y_BD, new_state_BDN


@selective_scan_step_triton.register_fake
def _(
    state_BDN: Tensor,
    x_BD: Tensor,
    dt_BD: Tensor,
    A_DN: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    D_D: Tensor | None,
    dt_bias_D: Tensor | None,
    z_BD: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    return x_BD.new_empty(x_BD.shape), state_BDN.new_empty(state_BDN.shape, dtype=torch.float32)

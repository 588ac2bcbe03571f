"""The decode step on a GPU: one pass over the state, which is nearly all there is to read and write.

Legend: B batch, D channels, N states per channel, H heads, G groups of heads, M slots of a pool; in the kernel C
channels of a program.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridize.ops.launch import contiguous_rows, on_its_device
from hybridize.ops.selective_scan.triton_parts import decay_rates, sigmoid, softplus

# Numbers of a program's share of the state, and its warps.
_BLOCK_NUMEL, _WARPS = 2048, 4


@triton.jit
def _step_kernel(
    old_ptr, new_ptr, slot_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, z_ptr, y_ptr,
    null_slot, num_channels, old_stride, new_stride, x_stride, dt_stride, B_stride, C_stride, z_stride,
    N: tl.constexpr, NUM_STATES: tl.constexpr, PER_HEAD: tl.constexpr, PER_GROUP: tl.constexpr,
    HAS_SLOTS: tl.constexpr, A_IS_LOG: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, C: tl.constexpr,
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
    state_N = tl.arange(0, N)
    valid_CN = valid_C[:, None] & (state_N < NUM_STATES)[None, :]
    offset_CN = channel_C[:, None] * NUM_STATES + state_N[None, :]
    state_CN = tl.load(old_ptr + slot * old_stride + offset_CN, mask=valid_CN, other=0.0).to(tl.float32)
    A_CN = tl.load(A_ptr + offset_CN, mask=valid_CN, other=0.0).to(tl.float32)
    if A_IS_LOG:
        A_CN = -tl.exp(A_CN)
    A_CN = decay_rates(A_CN)
    group_offset_CN = (channel_C // PER_GROUP * NUM_STATES)[:, None] + state_N[None, :]
    head_offset_CN = (channel_C // PER_HEAD * NUM_STATES)[:, None] + state_N[None, :]
    B_CN = tl.load(B_ptr + row * B_stride + group_offset_CN, mask=valid_CN, other=0.0).to(tl.float32)
    C_CN = tl.load(C_ptr + row * C_stride + head_offset_CN, mask=valid_CN, other=0.0).to(tl.float32)
    x_C = tl.load(x_ptr + row * x_stride + channel_C, mask=valid_C, other=0.0).to(tl.float32)
    delta_C = tl.load(dt_ptr + row * dt_stride + channel_C, mask=valid_C, other=0.0).to(tl.float32)
    if HAS_BIAS:
        delta_C += tl.load(bias_ptr + channel_C, mask=valid_C, other=0.0).to(tl.float32)
    if SOFTPLUS:
        delta_C = softplus(delta_C)
    state_CN = tl.exp2(delta_C[:, None] * A_CN) * state_CN + (delta_C * x_C)[:, None] * B_CN
    tl.store(new_ptr + slot * new_stride + offset_CN, state_CN.to(new_ptr.dtype.element_ty), mask=valid_CN)
    y_C = tl.sum(state_CN * C_CN, axis=1)
    if HAS_D:
        y_C += tl.load(D_ptr + channel_C, mask=valid_C, other=0.0).to(tl.float32) * x_C
    if HAS_Z:
        z_C = tl.load(z_ptr + row * z_stride + channel_C, mask=valid_C, other=0.0).to(tl.float32)
        y_C *= z_C * sigmoid(z_C)
    tl.store(y_ptr + channel_C, y_C.to(y_ptr.dtype.element_ty), mask=valid_C)


@on_its_device
def selective_scan_step_in_place_triton(
    pool_MDN: Tensor,
    slot_B: Tensor | None,
    x_BD: Tensor,
    dt_BD: Tensor,
    A_log_DN: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    D_D: Tensor | None,
    dt_bias_D: Tensor | None,
    z_BD: Tensor | None,
    dt_softplus: bool,
    null_slot: int | None,
) -> Tensor:
    """Advance states in a pool; the arguments are those of `selective_scan_step_in_place`, checked, of some rows.

    Returns:
        y [B, D] in x's dtype.
    """
    tokens = (x_BD, dt_BD, B_BGN, C_BHN, z_BD)
    return _launch(pool_MDN, pool_MDN, slot_B, tokens, A_log_DN, D_D, dt_bias_D, True, dt_softplus, null_slot)


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
    state_BDN = contiguous_rows(state_BDN)
    new_state_BDN = torch.empty(state_BDN.shape, dtype=torch.float32, device=state_BDN.device)
    tokens = (x_BD, dt_BD, B_BGN, C_BHN, z_BD)
    y_BD = _launch(state_BDN, new_state_BDN, None, tokens, A_DN, D_D, dt_bias_D, False, dt_softplus, None)
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


def _launch(
    old: Tensor,
    new: Tensor,
    slot_B: Tensor | None,
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    A_DN: Tensor,
    D_D: Tensor | None,
    dt_bias_D: Tensor | None,
    A_is_log: bool,
    dt_softplus: bool,
    null_slot: int | None,
) -> Tensor:
    x_BD, dt_BD, B_BGN, C_BHN = (contiguous_rows(tensor) for tensor in tokens[:4])
    z_BD = None if tokens[4] is None else contiguous_rows(tokens[4])
    A_DN, D_D, dt_bias_D = (None if t is None else t.contiguous() for t in (A_DN, D_D, dt_bias_D))
    (batch, num_channels), num_states = x_BD.shape, A_DN.shape[1]
    y_BD = x_BD.new_empty(batch, num_channels)
    padded_states = triton.next_power_of_2(num_states)
    block = max(1, min(triton.next_power_of_2(num_channels), _BLOCK_NUMEL // padded_states))
    _step_kernel[(triton.cdiv(num_channels, block), batch)](
        old, new, x_BD if slot_B is None else slot_B.contiguous(), x_BD, dt_BD, A_DN, B_BGN, C_BHN,
        A_DN if D_D is None else D_D, A_DN if dt_bias_D is None else dt_bias_D, x_BD if z_BD is None else z_BD, y_BD,
        -1 if null_slot is None else null_slot, num_channels, old.stride(0), new.stride(0), x_BD.stride(0),
        dt_BD.stride(0), B_BGN.stride(0), C_BHN.stride(0), 0 if z_BD is None else z_BD.stride(0),
        N=padded_states, NUM_STATES=num_states, PER_HEAD=num_channels // C_BHN.shape[1],
        PER_GROUP=num_channels // B_BGN.shape[1], HAS_SLOTS=slot_B is not None,
        A_IS_LOG=A_is_log, SOFTPLUS=dt_softplus, HAS_D=D_D is not None, HAS_BIAS=dt_bias_D is not None,
        HAS_Z=z_BD is not None, C=block, num_warps=_WARPS,
    )  # fmt: skip
    return y_BD

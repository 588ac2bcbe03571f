"""One token of state space duality on a GPU: one pass over the states, nearly all there is to read and write.

A program has a block of one head's channels with all their states. It reads the state before the token off at C, and
adds what the token brings: S' C = a S C + Δ x (B C).

Legend: B batch, H heads, G groups of heads, P channels of a head, N states per channel, M slots of a pool; in the
kernel P and N are a program's share, padded to powers of two.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridize.ops.launch import contiguous_rows, on_its_device
from hybridize.ops.selective_scan.triton_parts import softplus

# Numbers of a program's share of the state, and its warps.
_BLOCK_NUMEL, _WARPS = 4096, 4


@triton.jit
def _step_kernel(
    old_ptr, new_ptr, slot_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, y_ptr,
    null_slot, old_stride, new_stride, x_stride, dt_stride, B_stride, C_stride,
    NUM_HEADS: tl.constexpr, PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, NUM_STATES: tl.constexpr,
    HAS_SLOTS: tl.constexpr, A_IS_LOG: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_blocks: tl.constexpr = (WIDTH + P - 1) // P
    head = program // num_blocks % NUM_HEADS
    row = (program // (num_blocks * NUM_HEADS)).to(tl.int64)
    channel_P = program % num_blocks * P + tl.arange(0, P)
    state_N = tl.arange(0, N)
    valid_P = channel_P < WIDTH
    valid_N = state_N < NUM_STATES
    y_ptr += (row * NUM_HEADS + head) * WIDTH
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slot_ptr + row).to(tl.int64)
        if slot == null_slot:
            tl.store(y_ptr + channel_P, tl.zeros([P], y_ptr.dtype.element_ty), mask=valid_P)
            return
    offset_PN = head * (WIDTH * NUM_STATES) + channel_P[:, None] * NUM_STATES + state_N[None, :]
    valid_PN = valid_P[:, None] & valid_N[None, :]
    state_PN = tl.load(old_ptr + slot * old_stride + offset_PN, mask=valid_PN, other=0.0).to(tl.float32)
    group = head // PER_GROUP
    x_P = tl.load(x_ptr + row * x_stride + group * WIDTH + channel_P, mask=valid_P, other=0.0).to(tl.float32)
    B_N = tl.load(B_ptr + row * B_stride + group * NUM_STATES + state_N, mask=valid_N, other=0.0).to(tl.float32)
    C_N = tl.load(C_ptr + row * C_stride + head * NUM_STATES + state_N, mask=valid_N, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + head).to(tl.float32)
    if A_IS_LOG:
        A = -tl.exp(A)
    # The head's one step size, once for each channel.
    delta_P = tl.load(dt_ptr + row * dt_stride + head + channel_P * 0, mask=valid_P, other=0.0).to(tl.float32)
    if HAS_BIAS:
        delta_P += tl.load(bias_ptr + head).to(tl.float32)
    if SOFTPLUS:
        delta_P = softplus(delta_P)
    drive_P = delta_P * x_P
    state_PN *= tl.exp(delta_P * A)[:, None]
    y_P = tl.sum(state_PN * C_N[None, :], axis=1) + drive_P * tl.sum(B_N * C_N, axis=0)
    if HAS_D:
        y_P += tl.load(D_ptr + head).to(tl.float32) * x_P
    state_PN += drive_P[:, None] * B_N[None, :]
    tl.store(new_ptr + slot * new_stride + offset_PN, state_PN.to(new_ptr.dtype.element_ty), mask=valid_PN)
    tl.store(y_ptr + channel_P, y_P.to(y_ptr.dtype.element_ty), mask=valid_P)


@on_its_device
def ssd_step_in_place_triton(
    pool_MHPN: Tensor,
    slot_B: Tensor | None,
    x_BGP: Tensor,
    dt_BH: Tensor,
    A_log_H: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_softplus: bool,
    null_slot: int | None,
) -> Tensor:
    """Advance states in a pool; the arguments are those of `ssd_step_in_place`, checked, of some rows.

    Returns:
        y [B, H, P] in x's dtype.
    """
    tokens = (x_BGP, dt_BH, B_BGN, C_BHN)
    return _launch(pool_MHPN, pool_MHPN, slot_B, tokens, A_log_H, D_H, dt_bias_H, True, dt_softplus, null_slot)


@torch.library.custom_op("hybridize::ssd_step", mutates_args=())
@on_its_device
def ssd_step_triton(
    state_BHPN: Tensor,
    x_BGP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Advance states by one token; the arguments are those of `ssd_step`, checked.

    Returns:
        y [B, H, P] in x's dtype, and the new state [B, H, P, N] in fp32.
    """
    state_BHPN = contiguous_rows(state_BHPN)
    new_state_BHPN = torch.empty(state_BHPN.shape, dtype=torch.float32, device=state_BHPN.device)
    tokens = (x_BGP, dt_BH, B_BGN, C_BHN)
    y_BHP = _launch(state_BHPN, new_state_BHPN, None, tokens, A_H, D_H, dt_bias_H, False, dt_softplus, None)
    return y_BHP, new_state_BHPN


@ssd_step_triton.register_fake
def _(
    state_BHPN: Tensor,
    x_BGP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    return x_BGP.new_empty(state_BHPN.shape[:3]), state_BHPN.new_empty(state_BHPN.shape, dtype=torch.float32)


def _launch(
    old: Tensor,
    new: Tensor,
    slot_B: Tensor | None,
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    A_H: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    A_is_log: bool,
    dt_softplus: bool,
    null_slot: int | None,
) -> Tensor:
    x_BGP, dt_BH, B_BGN, C_BHN = (contiguous_rows(tensor) for tensor in tokens)
    A_H, D_H, dt_bias_H = (None if t is None else t.contiguous() for t in (A_H, D_H, dt_bias_H))
    (batch, num_groups, width), (num_heads, num_states) = x_BGP.shape, C_BHN.shape[1:]
    y_BHP = x_BGP.new_empty(batch, num_heads, width)
    states = triton.next_power_of_2(num_states)
    channels = max(1, min(triton.next_power_of_2(width), _BLOCK_NUMEL // states))
    _step_kernel[(batch * num_heads * triton.cdiv(width, channels),)](
        old, new, x_BGP if slot_B is None else slot_B.contiguous(), x_BGP, dt_BH, A_H, B_BGN, C_BHN,
        A_H if D_H is None else D_H, A_H if dt_bias_H is None else dt_bias_H, y_BHP,
        -1 if null_slot is None else null_slot, old.stride(0), new.stride(0), x_BGP.stride(0), dt_BH.stride(0),
        B_BGN.stride(0), C_BHN.stride(0),
        NUM_HEADS=num_heads, PER_GROUP=num_heads // num_groups, WIDTH=width, NUM_STATES=num_states,
        HAS_SLOTS=slot_B is not None, A_IS_LOG=A_is_log, SOFTPLUS=dt_softplus,
        HAS_D=D_H is not None, HAS_BIAS=dt_bias_H is not None, P=channels, N=states, num_warps=_WARPS,
    )  # fmt: skip
    return y_BHP

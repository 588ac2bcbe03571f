"""One decode step of state space duality: the recurrence once, for one token of each sequence.

On a GPU, without gradients, a Triton kernel does it in one pass over the states (`triton_step`).

Legend: B batch, H heads, G groups of heads, R heads of a group, P channels of a head, N states per channel, M slots of
a pool.
"""

import torch
from torch import Tensor

from hybridize.ops.launch import is_learning, takes_kernel
from hybridize.ops.precision import at_least_fp32
from hybridize.ops.slots import check_pool, read_slots, write_slots, zero_null_rows
from hybridize.ops.ssd.step_sizes import step_sizes


def ssd_step(
    state_BHPN: Tensor,
    x_BGP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token (arXiv 2405.21060, the recurrent form).

    Args:
        state_BHPN: state before the token, [B, H, P, N]; left as it is.
        x_BGP: input per group, [B, G, P].
        dt_BH: step size before bias and softplus, [B, H].
        A_H: -exp(A_log), [H]; negative.
        B_BGN: input projection per group, [B, G, N].
        C_BHN: read-out per head, [B, H, N].
        D_H: weight of the skip connection, [H].
        dt_bias_H: added to dt, [H].
        dt_softplus: whether softplus makes the step size of dt.

    Returns:
        y [B, H, P] in x's dtype, and the new state [B, H, P, N] in fp32 (fp64 if x is).

    Raises:
        ValueError: a shape does not fit; names the argument, its value and the remedy.
    """
    _check(x_BGP, dt_BH, ("A_H", A_H), B_BGN, C_BHN)
    shape = (*C_BHN.shape[:2], x_BGP.shape[2], C_BHN.shape[2])
    if tuple(state_BHPN.shape) != shape:
        raise ValueError(f"state_BHPN: shape {tuple(state_BHPN.shape)}; pass {list(shape)}, to go with x and C")
    args = (state_BHPN, x_BGP, dt_BH, A_H, B_BGN, C_BHN, D_H, dt_bias_H)
    if takes_kernel(x_BGP) and x_BGP.shape[0] and not is_learning(*args):
        from hybridize.ops.ssd.triton_step import ssd_step_triton

        return ssd_step_triton(*args, dt_softplus)
    return _step(*args, dt_softplus)


@torch.no_grad()
def ssd_step_in_place(
    pool_MHPN: Tensor,
    slot_B: Tensor | None,
    x_BGP: Tensor,
    dt_BH: Tensor,
    A_log_H: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = True,
    null_slot: int | None = None,
) -> Tensor:
    """Advance states in a pool by one token; see `hybridize.ops.slots`. No gradients.

    Args:
        pool_MHPN: states, [M, H, P, N], in any float dtype; those of the step's sequences are updated.
        slot_B: where each sequence has its state, int32 or int64; None: sequence b in slot b.
        x_BGP: as for `ssd_step`, and so on.
        dt_BH: step size before bias and softplus.
        A_log_H: what A is -exp of, [H].
        B_BGN: input projection per group.
        C_BHN: read-out per head.
        D_H: weight of the skip connection.
        dt_bias_H: added to dt.
        dt_softplus: whether softplus makes the step size of dt.
        null_slot: the slot that stands for no sequence, if there is one.

    Returns:
        y [B, H, P] in x's dtype, zero where the slot is the null slot.

    Raises:
        ValueError: a shape or a dtype does not fit; names the argument, its value and the remedy.
    """
    _check(x_BGP, dt_BH, ("A_log_H", A_log_H), B_BGN, C_BHN)
    batch, num_heads, num_states = C_BHN.shape
    check_pool("pool_MHPN", pool_MHPN, (num_heads, x_BGP.shape[2], num_states), slot_B, batch, null_slot)
    if takes_kernel(x_BGP) and batch:
        from hybridize.ops.ssd.triton_step import ssd_step_in_place_triton

        return ssd_step_in_place_triton(
            pool_MHPN, slot_B, x_BGP, dt_BH, A_log_H, B_BGN, C_BHN, D_H, dt_bias_H, dt_softplus, null_slot
        )
    A_H = -torch.exp(at_least_fp32(A_log_H))
    state_BHPN = read_slots(pool_MHPN, slot_B, batch)
    y_BHP, new_BHPN = _step(state_BHPN, x_BGP, dt_BH, A_H, B_BGN, C_BHN, D_H, dt_bias_H, dt_softplus)
    write_slots(pool_MHPN, slot_B, new_BHPN, null_slot)
    return zero_null_rows(y_BHP, slot_B, null_slot)


def _check(x_BGP: Tensor, dt_BH: Tensor, A: tuple[str, Tensor], B_BGN: Tensor, C_BHN: Tensor) -> None:
    batch, num_groups, _ = x_BGP.shape
    num_heads, num_states = C_BHN.shape[1:]
    expected = {
        "dt_BH": (dt_BH, (batch, num_heads)),
        A[0]: (A[1], (num_heads,)),
        "B_BGN": (B_BGN, (batch, num_groups, num_states)),
        "C_BHN": (C_BHN, (batch, num_heads, num_states)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; pass {list(shape)}, to go with x and C")
    if num_heads % num_groups:
        raise ValueError(f"C_BHN: {num_heads} heads are no multiple of x's {num_groups} groups; use a multiple")


def _step(
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
    batch, num_groups = x_BGP.shape[:2]
    dtype = torch.promote_types(x_BGP.dtype, torch.float32)
    delta_BH = step_sizes(dt_BH, dt_bias_H, dt_softplus, dtype)
    decay_BH = torch.exp(delta_BH * A_H.to(dtype))
    x_BG1P = x_BGP.to(dtype).unsqueeze(2)
    drive_BGRP = delta_BH.view(batch, num_groups, delta_BH.shape[1] // num_groups, 1) * x_BG1P
    added_BGRPN = drive_BGRP.unsqueeze(-1) * B_BGN.to(dtype)[:, :, None, None]
    new_state_BHPN = torch.addcmul(added_BGRPN.flatten(1, 2), decay_BH[..., None, None], state_BHPN.to(dtype))
    y_BHP = (new_state_BHPN * C_BHN.to(dtype).unsqueeze(-2)).sum(dim=-1)
    if D_H is not None:
        y_BHP = y_BHP + (D_H.to(dtype).view(num_groups, -1, 1) * x_BG1P).flatten(1, 2)
    return y_BHP.to(x_BGP.dtype), new_state_BHPN

"""One decode step of the selective scan: the recurrence once, for one token of each sequence.

On a GPU, without gradients, a Triton kernel does it in one pass over the state (`triton_step`).

Legend: B batch, D channels, N states per channel, H heads, G groups of heads, P channels per head or group, M slots of
a pool.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from hybridize.ops.launch import is_learning, takes_kernel
from hybridize.ops.precision import at_least_fp32
from hybridize.ops.slots import check_pool, read_slots, write_slots, zero_null_rows


def selective_scan_step(
    state_BDN: Tensor,
    x_BD: Tensor,
    dt_BD: Tensor,
    A_DN: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    *,
    D_D: Tensor | None = None,
    dt_bias_D: Tensor | None = None,
    dt_softplus: bool = True,
    z_BD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token (arXiv 2312.00752, algorithm 2, one turn of the loop).

    Args:
        state_BDN: state before the token, [B, D, N]; left as it is.
        x_BD: input, [B, D].
        dt_BD: step size before bias and softplus, [B, D].
        A_DN: -exp(A_log), [D, N]; negative.
        B_BGN: input projection per group, [B, G, N].
        C_BHN: read-out per head, [B, H, N].
        D_D: weight of the skip connection, [D].
        dt_bias_D: added to dt, [D].
        dt_softplus: whether softplus makes the step size of dt.
        z_BD: gate, [B, D].

    Returns:
        y [B, D] in x's dtype, and the new state [B, D, N] in fp32 (fp64 if x is).

    Raises:
        ValueError: a shape does not fit; names the argument, its value and the remedy.
    """
    _check(x_BD, dt_BD, ("A_DN", A_DN), B_BGN, C_BHN)
    shape = (x_BD.shape[0], *A_DN.shape)
    if tuple(state_BDN.shape) != shape:
        raise ValueError(f"state_BDN: shape {tuple(state_BDN.shape)}; pass {list(shape)}, to go with x and A")
    args = (state_BDN, x_BD, dt_BD, A_DN, B_BGN, C_BHN, D_D, dt_bias_D, z_BD)
    if takes_kernel(x_BD) and x_BD.shape[0] and not is_learning(*args):
        from hybridize.ops.selective_scan.triton_step import selective_scan_step_triton

        return selective_scan_step_triton(*args, dt_softplus)
    return _step(*args, dt_softplus)


@torch.no_grad()
def selective_scan_step_in_place(
    pool_MDN: Tensor,
    slot_B: Tensor | None,
    x_BD: Tensor,
    dt_BD: Tensor,
    A_log_DN: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    *,
    D_D: Tensor | None = None,
    dt_bias_D: Tensor | None = None,
    dt_softplus: bool = True,
    z_BD: Tensor | None = None,
    null_slot: int | None = None,
) -> Tensor:
    """Advance states in a pool by one token; see `hybridize.ops.slots`. No gradients.

    Args:
        pool_MDN: states, [M, D, N], in any float dtype; those of the step's sequences are updated.
        slot_B: where each sequence has its state, int32 or int64; None: sequence b in slot b.
        x_BD: as for `selective_scan_step`, and so on.
        dt_BD: step size before bias and softplus.
        A_log_DN: what A is -exp of, [D, N].
        B_BGN: input projection per group.
        C_BHN: read-out per head.
        D_D: weight of the skip connection.
        dt_bias_D: added to dt.
        dt_softplus: whether softplus makes the step size of dt.
        z_BD: gate.
        null_slot: the slot that stands for no sequence, if there is one.

    Returns:
        y [B, D] in x's dtype, zero where the slot is the null slot.

    Raises:
        ValueError: a shape or a dtype does not fit; names the argument, its value and the remedy.
    """
    _check(x_BD, dt_BD, ("A_log_DN", A_log_DN), B_BGN, C_BHN)
    batch = x_BD.shape[0]
    check_pool("pool_MDN", pool_MDN, tuple(A_log_DN.shape), slot_B, batch, null_slot)
    if takes_kernel(x_BD) and batch:
        from hybridize.ops.selective_scan.triton_step import selective_scan_step_in_place_triton

        return selective_scan_step_in_place_triton(
            pool_MDN, slot_B, x_BD, dt_BD, A_log_DN, B_BGN, C_BHN, D_D, dt_bias_D, z_BD, dt_softplus, null_slot
        )
    A_DN = -torch.exp(at_least_fp32(A_log_DN))
    state_BDN = read_slots(pool_MDN, slot_B, batch)
    y_BD, new_BDN = _step(state_BDN, x_BD, dt_BD, A_DN, B_BGN, C_BHN, D_D, dt_bias_D, z_BD, dt_softplus)
    write_slots(pool_MDN, slot_B, new_BDN, null_slot)
    return zero_null_rows(y_BD, slot_B, null_slot)


def _check(x_BD: Tensor, dt_BD: Tensor, A: tuple[str, Tensor], B_BGN: Tensor, C_BHN: Tensor) -> None:
    batch, num_channels = x_BD.shape
    num_states = A[1].shape[1]
    expected = {
        "dt_BD": (dt_BD, (batch, num_channels)),
        A[0]: (A[1], (num_channels, num_states)),
        "B_BGN": (B_BGN, (batch, B_BGN.shape[1], num_states)),
        "C_BHN": (C_BHN, (batch, C_BHN.shape[1], num_states)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; pass {list(shape)}, to go with x and A")
    num_groups, num_heads = B_BGN.shape[1], C_BHN.shape[1]
    if num_channels % num_heads or num_heads % num_groups:
        raise ValueError(
            f"B_BGN, C_BHN: {num_groups} groups, {num_heads} heads, {num_channels} channels; "
            "groups must divide heads, and heads channels"
        )


def _step(
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
    batch, num_groups, num_heads = x_BD.shape[0], B_BGN.shape[1], C_BHN.shape[1]
    dtype = torch.promote_types(x_BD.dtype, torch.float32)
    x = x_BD.to(dtype)
    delta_BD = dt_BD.to(dtype)
    if dt_bias_D is not None:
        delta_BD = delta_BD + dt_bias_D.to(dtype)
    if dt_softplus:
        delta_BD = softplus(delta_BD)
    decay_BDN = torch.exp(delta_BD.unsqueeze(-1) * A_DN.to(dtype))
    drive_BGPN = (delta_BD * x).view(batch, num_groups, x.shape[1] // num_groups, 1) * B_BGN.to(dtype).unsqueeze(2)
    new_state_BDN = torch.addcmul(drive_BGPN.flatten(1, 2), decay_BDN, state_BDN.to(dtype))
    y_BHP = (new_state_BDN.unflatten(1, (num_heads, -1)) * C_BHN.to(dtype).unsqueeze(2)).sum(dim=-1)
    y_BD = y_BHP.flatten(1)
    if D_D is not None:
        y_BD = y_BD + D_D.to(dtype) * x
    if z_BD is not None:
        y_BD = y_BD * silu(z_BD.to(dtype))
    return y_BD.to(x_BD.dtype), new_state_BDN

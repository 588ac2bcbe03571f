"""One decode step of state space duality: the recurrence once, for one token of each sequence.

Legend: B batch, H heads, G groups of heads, R heads of a group, P channels of a head, N states per channel.
"""

import torch
from torch import Tensor

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
    batch, num_groups, width = x_BGP.shape
    num_heads, num_states = C_BHN.shape[1:]
    expected = {
        "state_BHPN": (state_BHPN, (batch, num_heads, width, num_states)),
        "dt_BH": (dt_BH, (batch, num_heads)),
        "A_H": (A_H, (num_heads,)),
        "B_BGN": (B_BGN, (batch, num_groups, num_states)),
        "C_BHN": (C_BHN, (batch, num_heads, num_states)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; pass {list(shape)}, to go with x and C")
    if num_heads % num_groups:
        raise ValueError(f"C_BHN: {num_heads} heads are no multiple of x's {num_groups} groups; use a multiple")
    dtype = torch.promote_types(x_BGP.dtype, torch.float32)
    delta_BH = step_sizes(dt_BH, dt_bias_H, dt_softplus, dtype)
    decay_BH = torch.exp(delta_BH * A_H.to(dtype))
    x_BG1P = x_BGP.to(dtype).unsqueeze(2)
    drive_BGRP = delta_BH.view(batch, num_groups, -1, 1) * x_BG1P
    added_BGRPN = drive_BGRP.unsqueeze(-1) * B_BGN.to(dtype)[:, :, None, None]
    new_state_BHPN = torch.addcmul(added_BGRPN.flatten(1, 2), decay_BH[..., None, None], state_BHPN.to(dtype))
    y_BHP = (new_state_BHPN * C_BHN.to(dtype).unsqueeze(-2)).sum(dim=-1)
    if D_H is not None:
        y_BHP = y_BHP + (D_H.to(dtype).view(num_groups, -1, 1) * x_BG1P).flatten(1, 2)
    return y_BHP.to(x_BGP.dtype), new_state_BHPN

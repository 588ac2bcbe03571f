"""State space duality as the paper writes the recurrence (arXiv 2405.21060): a loop over time, the truth.

Legend: B batch, L length, H heads, G groups of heads, P channels of a head, N states per channel.
"""

import torch
from torch import Tensor


def ssd_reference(
    x_BLGP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = True,
    starts_BL: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan one token after the other; slow, and differentiable by autograd alone.

    The arguments are those of `hybridize.ops.ssd.ssd`, already checked. Autograd keeps L x H x P x N numbers several
    times over: use it to check the fast forms, not to train.

    Returns:
        y of shape [B, L, H, P] in x's dtype, and the state after the last token, [B, H, P, N].
    """
    dtype = torch.promote_types(x_BLGP.dtype, torch.float32)
    batch, length, num_groups, width = x_BLGP.shape
    num_heads, num_states = C_BLHN.shape[2:]
    heads_per_group = num_heads // num_groups
    x_BLHP = x_BLGP.to(dtype).repeat_interleave(heads_per_group, dim=2)
    B_BLHN = B_BLGN.to(dtype).repeat_interleave(heads_per_group, dim=2)

    delta_BLH = dt_BLH.to(dtype)
    if dt_bias_H is not None:
        delta_BLH = delta_BLH + dt_bias_H.to(dtype)
    if dt_softplus:
        delta_BLH = torch.nn.functional.softplus(delta_BLH)
    decay_BLH = torch.exp(delta_BLH * A_H.to(dtype))

    if initial_state_BHPN is None:
        state_BHPN = x_BLGP.new_zeros(batch, num_heads, width, num_states, dtype=dtype)
    else:
        state_BHPN = initial_state_BHPN.to(dtype)

    # unbind: as cheap to read as indexing, and its backward does not fill a whole sequence per token.
    x_steps, B_steps, C_steps = x_BLHP.unbind(1), B_BLHN.unbind(1), C_BLHN.to(dtype).unbind(1)
    delta_steps, decay_steps = delta_BLH.unbind(1), decay_BLH.unbind(1)
    y_steps = []
    for t in range(length):
        if starts_BL is not None:
            state_BHPN = state_BHPN.masked_fill(starts_BL[:, t, None, None, None], 0.0)
        drive_BHP = delta_steps[t].unsqueeze(-1) * x_steps[t]
        added_BHPN = drive_BHP.unsqueeze(-1) * B_steps[t].unsqueeze(-2)
        state_BHPN = decay_steps[t][..., None, None] * state_BHPN + added_BHPN
        y_steps.append((state_BHPN * C_steps[t].unsqueeze(-2)).sum(dim=-1))
    y_BLHP = torch.stack(y_steps, dim=1)

    if D_H is not None:
        y_BLHP = y_BLHP + D_H.to(dtype).unsqueeze(-1) * x_BLHP
    return y_BLHP.to(x_BLGP.dtype), state_BHPN

"""The selective scan as the paper writes it (arXiv 2312.00752, algorithm 2): a loop over time, the truth.

Legend: B batch, L length, D channels, N states per channel, H heads, G groups of heads.
"""

import torch
from torch import Tensor


def selective_scan_reference(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    *,
    D_D: Tensor | None = None,
    dt_bias_D: Tensor | None = None,
    dt_softplus: bool = True,
    z_BLD: Tensor | None = None,
    starts_BL: Tensor | None = None,
    initial_state_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan one token after the other; slow, and differentiable by autograd alone.

    The arguments are those of `hybridize.ops.selective_scan.selective_scan`, already checked. It holds
    L x D x N numbers several times over: use it to check the fast forms, not to train.

    Returns:
        y of shape [B, L, D] in x's dtype, and the state after the last token, [B, D, N].
    """
    dtype = torch.promote_types(x_BLD.dtype, torch.float32)
    batch, length, num_channels = x_BLD.shape
    A_DN = A_DN.to(dtype)
    channels_per_group = num_channels // B_BLGN.shape[2]
    channels_per_head = num_channels // C_BLHN.shape[2]
    B_BLDN = B_BLGN.to(dtype).repeat_interleave(channels_per_group, dim=2)
    C_BLDN = C_BLHN.to(dtype).repeat_interleave(channels_per_head, dim=2)

    delta_BLD = dt_BLD.to(dtype)
    if dt_bias_D is not None:
        delta_BLD = delta_BLD + dt_bias_D.to(dtype)
    if dt_softplus:
        delta_BLD = torch.nn.functional.softplus(delta_BLD)

    if initial_state_BDN is None:
        state_BDN = x_BLD.new_zeros(batch, num_channels, A_DN.shape[1], dtype=dtype)
    else:
        state_BDN = initial_state_BDN.to(dtype)

    # unbind: as cheap to read as indexing, and its backward does not fill a whole sequence per token.
    x_steps, delta_steps = x_BLD.to(dtype).unbind(1), delta_BLD.unbind(1)
    B_steps, C_steps = B_BLDN.unbind(1), C_BLDN.unbind(1)
    y_steps = []
    for t in range(length):
        if starts_BL is not None:
            state_BDN = state_BDN.masked_fill(starts_BL[:, t, None, None], 0.0)
        x_BD1, delta_BD1 = x_steps[t].unsqueeze(-1), delta_steps[t].unsqueeze(-1)
        state_BDN = torch.exp(delta_BD1 * A_DN) * state_BDN + delta_BD1 * x_BD1 * B_steps[t]
        y_steps.append((state_BDN * C_steps[t]).sum(dim=-1))
    y_BLD = torch.stack(y_steps, dim=1)

    if D_D is not None:
        y_BLD = y_BLD + D_D.to(dtype) * x_BLD.to(dtype)
    if z_BLD is not None:
        y_BLD = y_BLD * torch.nn.functional.silu(z_BLD.to(dtype))
    return y_BLD.to(x_BLD.dtype), state_BDN

"""The delta rule with decays as the papers write it (arXiv 2412.06464, 2510.26692): a loop over time, the truth.

    S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ,    o_t = scale · S_tᵀ q_t

Legend: B batch, L length, H heads, G groups of heads, K width of queries and keys, V width of values.
"""

import torch
from torch import Tensor


def delta_rule_reference(
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGV: Tensor,
    g: Tensor,
    beta_BLH: Tensor,
    *,
    scale: float,
    starts_BL: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one token after the other; slow, and differentiable by autograd alone.

    The arguments are those of the ops with a delta rule, already checked; `g` is [B, L, H, K] (Kimi delta attention) or
    [B, L, H] (gated delta net: Diag(α) = α). It holds L states: use it to check the fast forms, not to train.

    Returns:
        o of shape [B, L, H, V] in q's dtype, and the state after the last token, [B, H, K, V].
    """
    dtype = torch.promote_types(q_BLHK.dtype, torch.float32)
    batch, length, num_heads, key_width = q_BLHK.shape
    heads_per_group = num_heads // k_BLGK.shape[2]
    k_steps = k_BLGK.to(dtype).repeat_interleave(heads_per_group, dim=2).unbind(1)
    v_steps = v_BLGV.to(dtype).repeat_interleave(heads_per_group, dim=2).unbind(1)
    q_steps, beta_steps = q_BLHK.to(dtype).unbind(1), beta_BLH.to(dtype).unbind(1)
    alpha_steps = torch.exp((g if g.ndim == 4 else g.unsqueeze(-1)).to(dtype)).unbind(1)
    if initial_state_BHKV is None:
        state_BHKV = q_BLHK.new_zeros(batch, num_heads, key_width, v_BLGV.shape[-1], dtype=dtype)
    else:
        state_BHKV = initial_state_BHKV.to(dtype)
    o_steps = []
    for t in range(length):
        if starts_BL is not None:
            state_BHKV = state_BHKV.masked_fill(starts_BL[:, t, None, None, None], 0.0)
        k_BHK, beta_BH11 = k_steps[t], beta_steps[t][..., None, None]
        state_BHKV = alpha_steps[t][..., None] * state_BHKV
        held_BHV = (k_BHK.unsqueeze(-1) * state_BHKV).sum(dim=-2)
        erased_BHKV = k_BHK.unsqueeze(-1) * held_BHV.unsqueeze(-2)
        added_BHKV = k_BHK.unsqueeze(-1) * v_steps[t].unsqueeze(-2)
        state_BHKV = state_BHKV + beta_BH11 * (added_BHKV - erased_BHKV)
        o_steps.append(scale * (q_steps[t].unsqueeze(-1) * state_BHKV).sum(dim=-2))
    return torch.stack(o_steps, dim=1).to(q_BLHK.dtype), state_BHKV

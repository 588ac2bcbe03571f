"""One token of a delta rule, for decode steps.

Legend: B batch, H heads, G groups of heads, K width of queries and keys, V width of values.
"""

import torch
from torch import Tensor


def delta_rule_step(
    state_BHKV: Tensor,
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    decay_BHK: Tensor,
    beta_BH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token.

    Args:
        state_BHKV: state before the token; left as it is.
        q_BHK: queries.
        k_BGK: keys, one per group.
        v_BGV: values, one per group.
        decay_BHK: decays, not their logarithms; a last axis of 1 stands for all channels.
        beta_BH: strengths of writing.
        scale: factor of what is read.

    Returns:
        Outputs [B, H, V] in the queries' dtype, and the new state in fp32 (fp64 for fp64 queries).
    """
    dtype = torch.promote_types(q_BHK.dtype, torch.float32)
    heads_per_group = q_BHK.shape[1] // k_BGK.shape[1]
    k_BHK = k_BGK.to(dtype).repeat_interleave(heads_per_group, dim=1)
    v_BHV = v_BGV.to(dtype).repeat_interleave(heads_per_group, dim=1)
    decayed_BHKV = decay_BHK.to(dtype).unsqueeze(-1) * state_BHKV.to(dtype)
    written_BHV = beta_BH.to(dtype).unsqueeze(-1) * (v_BHV - _read(decayed_BHKV, k_BHK))
    new_state_BHKV = torch.addcmul(decayed_BHKV, k_BHK.unsqueeze(-1), written_BHV.unsqueeze(-2))
    o_BHV = scale * _read(new_state_BHKV, q_BHK.to(dtype))
    return o_BHV.to(q_BHK.dtype), new_state_BHKV


def _read(state_BHKV: Tensor, key_BHK: Tensor) -> Tensor:
    """What the state holds at a key, [B, H, V]; in its own precision, autocast or not."""
    with torch.autocast(state_BHKV.device.type, enabled=False):
        return (key_BHK.unsqueeze(-2) @ state_BHKV).squeeze(-2)

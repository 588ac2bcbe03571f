"""One token of a delta rule for many sequences whose states lie in a pool, with what comes before it.

Where an op's step takes queries, keys and gates ready for use and returns a new state, this one takes what the mixers'
projections give and updates the pool: on a GPU it is a single kernel.

Legend: B sequences, H heads, G groups of heads, K width of queries and keys, V width of values, M slots of a pool.
"""

import torch
from torch import Tensor

from hybridize.ops.delta_rule import gates
from hybridize.ops.delta_rule.checks import check_step
from hybridize.ops.delta_rule.step import delta_rule_step
from hybridize.ops.launch import takes_kernel
from hybridize.ops.slots import check_pool, read_slots, write_slots, zero_null_rows


@torch.no_grad()
def delta_rule_step_in_place(
    pool_MHKV: Tensor,
    slot_B: Tensor | None,
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    decay_inputs: Tensor,
    beta_inputs_BH: Tensor,
    *,
    A_log_H: Tensor,
    dt_bias: Tensor,
    unit_length: bool = False,
    scale: float | None = None,
    null_slot: int | None = None,
) -> Tensor:
    """Advance states in a pool by one token (arXiv 2412.06464, 2510.26692); see `hybridize.ops.slots`.

    The decays' logarithms are -exp(A_log) softplus(decay_inputs + dt_bias), the strengths of erasing and writing
    sigmoid(beta_inputs). No gradients.

    Args:
        pool_MHKV: states, [M, H, K, V], in any float dtype; those of the step's sequences are updated.
        slot_B: where each sequence has its state, int32 or int64; None: sequence b in slot b.
        q_BHK: queries, [B, H, K].
        k_BGK: keys, one per group, [B, G, K].
        v_BGV: values, one per group, [B, G, V].
        decay_inputs: [B, H], one decay per head, or [B, H, K], one per channel of the keys.
        beta_inputs_BH: [B, H].
        A_log_H: logarithms of the heads' rates, [H].
        dt_bias: [H] or [H K], as there are decays.
        unit_length: whether queries and keys are scaled to length 1.
        scale: factor of what is read; default: K^-0.5.
        null_slot: the slot that stands for no sequence, if there is one.

    Returns:
        Outputs [B, H, V] in the queries' dtype, zero where the slot is the null slot.

    Raises:
        ValueError: a shape or a dtype does not fit; names the argument, its value and the remedy.
    """
    per_channel = decay_inputs.ndim == 3
    named = (("decay_inputs", decay_inputs), ("beta_inputs_BH", beta_inputs_BH))
    check_step(None, q_BHK, k_BGK, v_BGV, *named, per_channel=per_channel)
    num_rows, num_heads, key_width = q_BHK.shape
    for name, tensor, size in (
        ("A_log_H", A_log_H, num_heads),
        ("dt_bias", dt_bias, num_heads * (key_width if per_channel else 1)),
    ):
        if tuple(tensor.shape) != (size,):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; pass [{size}], to go with the queries and decays")
    check_pool("pool_MHKV", pool_MHKV, (num_heads, key_width, v_BGV.shape[-1]), slot_B, num_rows, null_slot)
    scale = key_width**-0.5 if scale is None else scale
    if takes_kernel(q_BHK) and num_rows:
        from hybridize.ops.delta_rule.triton_step import step_in_place_triton

        return step_in_place_triton(
            pool_MHKV, slot_B, q_BHK, k_BGK, v_BGV, decay_inputs, beta_inputs_BH, A_log_H, dt_bias, unit_length,
            scale, null_slot,
        )  # fmt: skip
    dtype = torch.promote_types(q_BHK.dtype, torch.float32)
    inputs = decay_inputs.flatten(1)
    decay = torch.exp(gates.log_decays(inputs, A_log_H, dt_bias, per_channel))
    if unit_length:
        q_BHK, k_BGK = gates.unit_length(q_BHK), gates.unit_length(k_BGK)
    o_BHV, new_BHKV = delta_rule_step(
        read_slots(pool_MHKV, slot_B, num_rows),
        q_BHK,
        k_BGK,
        v_BGV,
        decay if per_channel else decay.unsqueeze(-1),
        torch.sigmoid(beta_inputs_BH.to(dtype)),
        scale,
    )
    write_slots(pool_MHKV, slot_B, new_BHKV, null_slot)
    return zero_null_rows(o_BHV, slot_B, null_slot)

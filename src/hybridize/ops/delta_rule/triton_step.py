"""One token of a delta rule on a GPU: one pass over the states, which are nearly all there is to read and write.

A program has a block of one head's values with all its keys. What the state holds at the key and at the query it reads
off together, from the decayed state before the token: o = S'ᵀ q + (kᵀ q) u is what the new state S' + k uᵀ holds at q.

Legend: B sequences, H heads, G groups of heads, K width of queries and keys, V width of values, M slots of a pool; in
the kernel K and V are a program's share, padded to powers of two.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridize.ops.delta_rule.gates import L2_EPS
from hybridize.ops.launch import contiguous_rows, on_its_device
from hybridize.ops.selective_scan.triton_parts import sigmoid, softplus

# Numbers of a program's share of the state, where the keys leave it the choice, and its warps.
_BLOCK_NUMEL, _WARPS = 4096, 4
# A row of a share is at least this long, so that memory is read in whole sectors.
_LEAST_VALUES = 16


@triton.jit
def _step_kernel(
    old_ptr, new_ptr, slot_ptr, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, A_log_ptr, dt_bias_ptr, o_ptr,
    scale, eps, null_slot, old_stride, new_stride, q_stride, k_stride, v_stride, g_stride, beta_stride,
    NUM_HEADS: tl.constexpr, PER_GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    HAS_SLOTS: tl.constexpr, PER_CHANNEL: tl.constexpr, OPEN_GATES: tl.constexpr,
    UNIT: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_blocks: tl.constexpr = (VALUES + V - 1) // V
    head = program // num_blocks % NUM_HEADS
    row = (program // (num_blocks * NUM_HEADS)).to(tl.int64)
    key_K = tl.arange(0, K)
    value_V = program % num_blocks * V + tl.arange(0, V)
    valid_K = key_K < KEYS
    valid_V = value_V < VALUES
    o_ptr += (row * NUM_HEADS + head) * VALUES
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slot_ptr + row).to(tl.int64)
        if slot == null_slot:
            tl.store(o_ptr + value_V, tl.zeros([V], o_ptr.dtype.element_ty), mask=valid_V)
            return
    offset_KV = head * (KEYS * VALUES) + key_K[:, None] * VALUES + value_V[None, :]
    valid_KV = valid_K[:, None] & valid_V[None, :]
    state_KV = tl.load(old_ptr + slot * old_stride + offset_KV, mask=valid_KV, other=0.0).to(tl.float32)
    group = head // PER_GROUP
    q_K = tl.load(q_ptr + row * q_stride + head * KEYS + key_K, mask=valid_K, other=0.0).to(tl.float32)
    k_K = tl.load(k_ptr + row * k_stride + group * KEYS + key_K, mask=valid_K, other=0.0).to(tl.float32)
    v_V = tl.load(v_ptr + row * v_stride + group * VALUES + value_V, mask=valid_V, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + row * beta_stride + head).to(tl.float32)
    # One decay for all channels of a head is read once for each.
    decay_offset_K = head * KEYS + key_K if PER_CHANNEL else head + key_K * 0
    g_K = tl.load(g_ptr + row * g_stride + decay_offset_K, mask=valid_K, other=0.0).to(tl.float32)
    if OPEN_GATES:
        bias_K = tl.load(dt_bias_ptr + decay_offset_K, mask=valid_K, other=0.0).to(tl.float32)
        g_K = -tl.exp(tl.load(A_log_ptr + head).to(tl.float32)) * softplus(g_K + bias_K)
        beta = sigmoid(beta)
    if UNIT:
        q_K *= tl.rsqrt(tl.sum(q_K * q_K, axis=0) + eps)
        k_K *= tl.rsqrt(tl.sum(k_K * k_K, axis=0) + eps)
    q_K *= scale
    state_KV *= tl.exp(g_K)[:, None]
    held_V = tl.sum(state_KV * k_K[:, None], axis=0)
    read_V = tl.sum(state_KV * q_K[:, None], axis=0)
    written_V = beta * (v_V - held_V)
    o_V = read_V + tl.sum(k_K * q_K, axis=0) * written_V
    state_KV += k_K[:, None] * written_V[None, :]
    tl.store(new_ptr + slot * new_stride + offset_KV, state_KV.to(new_ptr.dtype.element_ty), mask=valid_KV)
    tl.store(o_ptr + value_V, o_V.to(o_ptr.dtype.element_ty), mask=valid_V)


@on_its_device
def step_in_place_triton(
    pool_MHKV: Tensor,
    slot_B: Tensor | None,
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    decay_inputs: Tensor,
    beta_inputs_BH: Tensor,
    A_log_H: Tensor,
    dt_bias: Tensor,
    unit_length: bool,
    scale: float,
    null_slot: int | None,
) -> Tensor:
    """Advance states in a pool; the arguments are those of `delta_rule_step_in_place`, checked, with no row missing.

    Returns:
        Outputs [B, H, V] in the queries' dtype.
    """
    tokens = (q_BHK, k_BGK, v_BGV, decay_inputs, beta_inputs_BH)
    gates = (A_log_H.contiguous(), dt_bias.contiguous())
    return _launch(pool_MHKV, pool_MHKV, slot_B, tokens, gates, unit_length, scale, null_slot)


@torch.library.custom_op("hybridize::delta_rule_step", mutates_args=())
@on_its_device
def step_triton(
    state_BHKV: Tensor, q_BHK: Tensor, k_BGK: Tensor, v_BGV: Tensor, g: Tensor, beta_BH: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Advance states by one token; the arguments are those of the ops' steps, checked.

    Returns:
        Outputs [B, H, V] in the queries' dtype, and the new state in fp32.
    """
    state_BHKV = contiguous_rows(state_BHKV)
    new_state_BHKV = torch.empty(state_BHKV.shape, dtype=torch.float32, device=state_BHKV.device)
    tokens = (q_BHK, k_BGK, v_BGV, g, beta_BH)
    return _launch(state_BHKV, new_state_BHKV, None, tokens, None, False, scale, None), new_state_BHKV


@step_triton.register_fake
def _(
    state_BHKV: Tensor, q_BHK: Tensor, k_BGK: Tensor, v_BGV: Tensor, g: Tensor, beta_BH: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return q_BHK.new_empty(*q_BHK.shape[:2], v_BGV.shape[2]), state_BHKV.new_empty(
        state_BHKV.shape, dtype=torch.float32
    )


def _launch(
    old: Tensor,
    new: Tensor,
    slot_B: Tensor | None,
    tokens: tuple[Tensor, ...],
    gates: tuple[Tensor, Tensor] | None,
    unit_length: bool,
    scale: float,
    null_slot: int | None,
) -> Tensor:
    q_BHK, k_BGK, v_BGV, g, beta_BH = (contiguous_rows(tensor) for tensor in tokens)
    (num_rows, num_heads, key_width), (num_groups, value_width) = q_BHK.shape, v_BGV.shape[1:]
    o_BHV = q_BHK.new_empty(num_rows, num_heads, value_width)
    keys = triton.next_power_of_2(key_width)
    values = min(triton.next_power_of_2(value_width), max(_LEAST_VALUES, _BLOCK_NUMEL // keys))
    num_programs = num_rows * num_heads * triton.cdiv(value_width, values)
    A_log_H, dt_bias = (g, g) if gates is None else gates
    _step_kernel[(num_programs,)](
        old, new, g if slot_B is None else slot_B.contiguous(), q_BHK, k_BGK, v_BGV, g, beta_BH, A_log_H, dt_bias,
        o_BHV, scale, L2_EPS, -1 if null_slot is None else null_slot, old.stride(0), new.stride(0), q_BHK.stride(0),
        k_BGK.stride(0), v_BGV.stride(0), g.stride(0), beta_BH.stride(0),
        NUM_HEADS=num_heads, PER_GROUP=num_heads // num_groups, KEYS=key_width, VALUES=value_width,
        HAS_SLOTS=slot_B is not None, PER_CHANNEL=g.numel() > num_rows * num_heads,
        OPEN_GATES=gates is not None, UNIT=unit_length, K=keys, V=values, num_warps=_WARPS,
    )  # fmt: skip
    return o_BHV

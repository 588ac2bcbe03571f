"""The scan's forward kernels.

The sequence is cut into segments that run side by side. A first kernel learns what each segment alone adds to the
state, a second carries states from segment to segment, a third scans each segment from its right state. With one
segment per sequence the third is enough.

Legend: B batch, L length, D channels, N states per channel; S segments; inside a kernel T tokens of a tile, C channels
of a program, R x W states (see `triton_parts`).
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from hybridize.ops.selective_scan.triton_parts import (
    block_offsets,
    channel_offsets,
    decay_rates,
    last_token,
    load_matrix,
    load_rows,
    load_states,
    load_steps,
    pinned,
    scan_states,
    sigmoid,
    state_offsets,
    store_matrix,
    store_rows,
    sum_states,
)


@triton.jit(do_not_specialize=["one"])
def segment_states_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    starts_ptr,
    state_ptr,  # [B, S, D, N], out: what each segment alone leaves
    total_ptr,  # [B, S, D], out: the sum of its step sizes
    length,
    tiles_per_segment,
    num_segments,
    num_channels,
    one,
    x_stride_b,
    x_stride_t,
    dt_stride_b,
    dt_stride_t,
    B_stride_b,
    B_stride_t,
    N: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    T: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scan each segment but the last from a state of zero."""
    blocks_per_head: tl.constexpr = (PER_HEAD + PER_BLOCK - 1) // PER_BLOCK
    head = tl.program_id(0) // blocks_per_head
    segment = tl.program_id(1)  # nobody asks the last one
    row = tl.program_id(2).to(tl.int64)
    channel_C, valid_C = channel_offsets(head, tl.program_id(0) % blocks_per_head, PER_HEAD, PER_BLOCK)
    offset_WCR, valid_WCR = state_offsets(channel_C, valid_C, one, N, W, R)
    A_RCW = decay_rates(load_matrix(A_ptr, offset_WCR, valid_WCR))
    bias_C = tl.zeros([PER_BLOCK], tl.float32)
    if HAS_BIAS:
        bias_C = tl.load(bias_ptr + channel_C, mask=valid_C, other=0.0)
    group = head // HEADS_PER_GROUP
    x_ptr += row * x_stride_b
    dt_ptr += row * dt_stride_b
    B_ptr += row * B_stride_b + group * N
    starts_ptr += row * length
    first = segment.to(tl.int64) * tiles_per_segment * T
    x_ptr += first * x_stride_t
    dt_ptr += first * dt_stride_t
    B_ptr += first * B_stride_t
    starts_ptr += first
    left = length - first.to(tl.int32)
    state_RCW = tl.zeros([R, PER_BLOCK, W], tl.float32)
    total_C = tl.zeros([PER_BLOCK], tl.float32)
    for tile in tl.range(0, tiles_per_segment, num_stages=STAGES):
        token_T = tile * T + tl.arange(0, T)
        x_TC = load_rows(x_ptr, token_T, left, x_stride_t, channel_C, valid_C)
        dt_TC = load_rows(dt_ptr, token_T, left, dt_stride_t, channel_C, valid_C)
        B_TR1W = load_states(B_ptr, token_T, left, B_stride_t, N, W, R)
        delta_TC, gap_TC = load_steps(dt_TC, starts_ptr, token_T, left, bias_C, valid_C, SOFTPLUS, HAS_STARTS)
        decay_TRCW = tl.exp2(gap_TC[:, None, :, None] * A_RCW[None])
        drive_TRCW = pinned(delta_TC * x_TC)[:, None, :, None] * B_TR1W
        state_RCW = last_token(scan_states(decay_TRCW, drive_TRCW, state_RCW))
        total_C += tl.sum(gap_TC, axis=0)
    index = row * num_segments + segment
    store_matrix(state_ptr + index * num_channels * N, state_RCW, offset_WCR, valid_WCR)
    tl.store(total_ptr + index * num_channels + channel_C, total_C, mask=valid_C)


@triton.jit
def carry_kernel(
    state_ptr,  # [B, S, D, N], in: what each segment alone leaves; out: the state it starts from
    total_ptr,  # [B, S, D]
    A_ptr,
    initial_ptr,  # [B, D, N]
    num_segments,
    num_channels,
    N: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Carry states from segment to segment; in reverse, gradients of states."""
    row = tl.program_id(1).to(tl.int64)
    numel = num_channels * N
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < numel
    A = decay_rates(tl.load(A_ptr + index, mask=valid, other=0.0))
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + row * numel + index, mask=valid, other=0.0).to(tl.float32)
    for step in range(num_segments):
        segment = row * num_segments + (num_segments - 1 - step if REVERSE else step)
        pointer = state_ptr + segment * numel + index
        added = tl.load(pointer, mask=valid, other=0.0)
        total = tl.load(total_ptr + segment * num_channels + index // N, mask=valid, other=0.0)
        tl.store(pointer, state, mask=valid)
        state = tl.exp2(total * A) * state + added


@triton.jit(do_not_specialize=["one"])
def scan_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    z_ptr,
    starts_ptr,
    initial_ptr,  # [B, S, D, N]: the state before each segment
    y_ptr,  # [B, L, D], out
    final_ptr,  # [B, D, N], out
    kept_ptr,  # [B, K, programs, R x C x W], out: the state before each chunk of CHUNK tiles
    length,
    tiles_per_segment,
    num_segments,
    num_channels,
    num_kept,
    one,
    x_stride_b,
    x_stride_t,
    dt_stride_b,
    dt_stride_t,
    B_stride_b,
    B_stride_t,
    C_stride_b,
    C_stride_t,
    z_stride_b,
    z_stride_t,
    N: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    KEEP: tl.constexpr,
    CHUNK: tl.constexpr,
    T: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scan each segment from the state before it."""
    blocks_per_head: tl.constexpr = (PER_HEAD + PER_BLOCK - 1) // PER_BLOCK
    head = tl.program_id(0) // blocks_per_head
    segment = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    channel_C, valid_C = channel_offsets(head, tl.program_id(0) % blocks_per_head, PER_HEAD, PER_BLOCK)
    offset_WCR, valid_WCR = state_offsets(channel_C, valid_C, one, N, W, R)
    A_RCW = decay_rates(load_matrix(A_ptr, offset_WCR, valid_WCR))
    bias_C = tl.zeros([PER_BLOCK], tl.float32)
    if HAS_BIAS:
        bias_C = tl.load(bias_ptr + channel_C, mask=valid_C, other=0.0)
    if HAS_D:
        D_C = tl.load(D_ptr + channel_C, mask=valid_C, other=0.0)
    state_RCW = tl.zeros([R, PER_BLOCK, W], tl.float32)
    if HAS_INITIAL:
        initial_ptr += (row * num_segments + segment) * num_channels * N
        state_RCW = load_matrix(initial_ptr, offset_WCR, valid_WCR)
    first = segment.to(tl.int64) * tiles_per_segment * T
    x_ptr += row * x_stride_b + first * x_stride_t
    dt_ptr += row * dt_stride_b + first * dt_stride_t
    B_ptr += row * B_stride_b + first * B_stride_t + head // HEADS_PER_GROUP * N
    C_ptr += row * C_stride_b + first * C_stride_t + head * N
    z_ptr += row * z_stride_b + first * z_stride_t
    y_ptr += (row * length + first) * num_channels
    starts_ptr += row * length + first
    block: tl.constexpr = R * PER_BLOCK * W
    kept_stride = tl.num_programs(0) * block
    kept_ptr += (row * num_kept + segment * tiles_per_segment // CHUNK) * kept_stride + tl.program_id(0) * block
    block_WCR = block_offsets(one, PER_BLOCK, W, R)
    left = length - first.to(tl.int32)
    for tile in tl.range(0, tiles_per_segment, num_stages=STAGES):
        if KEEP and tile % CHUNK == 0 and tile * T < left:
            tl.store(kept_ptr + block_WCR, tl.permute(state_RCW, [2, 1, 0]))
            kept_ptr += kept_stride
        token_T = tile * T + tl.arange(0, T)
        x_TC = load_rows(x_ptr, token_T, left, x_stride_t, channel_C, valid_C)
        dt_TC = load_rows(dt_ptr, token_T, left, dt_stride_t, channel_C, valid_C)
        if HAS_Z:
            z_TC = load_rows(z_ptr, token_T, left, z_stride_t, channel_C, valid_C)
        B_TR1W = load_states(B_ptr, token_T, left, B_stride_t, N, W, R)
        C_TR1W = load_states(C_ptr, token_T, left, C_stride_t, N, W, R)
        delta_TC, gap_TC = load_steps(dt_TC, starts_ptr, token_T, left, bias_C, valid_C, SOFTPLUS, HAS_STARTS)
        decay_TRCW = tl.exp2(gap_TC[:, None, :, None] * A_RCW[None])
        drive_TRCW = pinned(delta_TC * x_TC)[:, None, :, None] * B_TR1W
        state_TRCW = scan_states(decay_TRCW, drive_TRCW, state_RCW)
        state_RCW = last_token(state_TRCW)
        y_TC = sum_states(state_TRCW * C_TR1W)
        if HAS_D:
            y_TC += D_C[None, :] * x_TC
        if HAS_Z:
            y_TC *= z_TC * sigmoid(z_TC)
        store_rows(y_ptr, y_TC, token_T, left, num_channels, channel_C, valid_C)
    if segment == num_segments - 1:
        store_matrix(final_ptr + row * num_channels * N, state_RCW, offset_WCR, valid_WCR)

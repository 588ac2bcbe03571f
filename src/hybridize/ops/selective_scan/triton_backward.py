"""The scan's backward kernels.

States are not stored: each tile's are computed again from the state kept before its chunk. As in the forward pass the
sequence is cut into segments: a first kernel learns what gradient each segment alone hands to the state before it, the
carry kernel passes gradients from segment to segment, and the last one does the work, tile by tile from the end. Every
sum is made in a fixed order, so the result is the same from run to run.

Legend: as in `triton_forward`; `parts` are the programs among which a head's or a group's channels are split.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from hybridize.ops.selective_scan.triton_parts import (
    LN2,
    block_offsets,
    channel_offsets,
    decay_rates,
    first_token,
    last_token,
    load_matrix,
    load_rows,
    load_states,
    load_steps,
    pinned,
    scan_carry,
    scan_grads,
    scan_states,
    scan_states_kept,
    sigmoid,
    state_offsets,
    store_matrix,
    store_rows,
    sum_states,
)


@triton.jit(do_not_specialize=["one"])
def segment_grads_kernel(
    dy_ptr,
    dt_ptr,
    A_ptr,
    C_ptr,
    bias_ptr,
    z_ptr,
    starts_ptr,
    grad_ptr,  # [B, S, D, N], out: the gradient of the state before each segment, from this segment alone
    total_ptr,  # [B, S, D], out: the sum of its step sizes
    length,
    tiles_per_segment,
    num_segments,
    num_channels,
    one,
    dy_stride_b,
    dy_stride_t,
    dt_stride_b,
    dt_stride_t,
    C_stride_b,
    C_stride_t,
    z_stride_b,
    z_stride_t,
    N: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    T: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run the adjoint recurrence over each segment but the first, from a gradient of zero."""
    blocks_per_head: tl.constexpr = (PER_HEAD + PER_BLOCK - 1) // PER_BLOCK
    head = tl.program_id(0) // blocks_per_head
    segment = tl.program_id(1) + 1  # nobody asks the first one
    row = tl.program_id(2).to(tl.int64)
    channel_C, valid_C = channel_offsets(head, tl.program_id(0) % blocks_per_head, PER_HEAD, PER_BLOCK)
    offset_WCR, valid_WCR = state_offsets(channel_C, valid_C, one, N, W, R)
    A_RCW = decay_rates(load_matrix(A_ptr, offset_WCR, valid_WCR))
    bias_C = tl.zeros([PER_BLOCK], tl.float32)
    if HAS_BIAS:
        bias_C = tl.load(bias_ptr + channel_C, mask=valid_C, other=0.0)
    first = segment.to(tl.int64) * tiles_per_segment * T
    dy_ptr += row * dy_stride_b + first * dy_stride_t
    dt_ptr += row * dt_stride_b + first * dt_stride_t
    C_ptr += row * C_stride_b + first * C_stride_t + head * N
    z_ptr += row * z_stride_b + first * z_stride_t
    starts_ptr += row * length + first
    left = length - first.to(tl.int32)
    carry_RCW = tl.zeros([R, PER_BLOCK, W], tl.float32)
    total_C = tl.zeros([PER_BLOCK], tl.float32)
    for step in tl.range(0, tiles_per_segment, num_stages=STAGES):
        token_T = (tiles_per_segment - 1 - step) * T + tl.arange(0, T)
        dy_TC = load_rows(dy_ptr, token_T, left, dy_stride_t, channel_C, valid_C)
        if HAS_Z:
            z_TC = load_rows(z_ptr, token_T, left, z_stride_t, channel_C, valid_C)
            dy_TC *= z_TC * sigmoid(z_TC)
        dt_TC = load_rows(dt_ptr, token_T, left, dt_stride_t, channel_C, valid_C)
        C_TR1W = load_states(C_ptr, token_T, left, C_stride_t, N, W, R)
        _, gap_TC = load_steps(dt_TC, starts_ptr, token_T, left, bias_C, valid_C, SOFTPLUS, HAS_STARTS)
        decay_TRCW = tl.exp2(gap_TC[:, None, :, None] * A_RCW[None])
        grad_TRCW = pinned(dy_TC)[:, None, :, None] * C_TR1W
        carry_RCW = first_token(scan_carry(decay_TRCW, grad_TRCW, carry_RCW))
        total_C += tl.sum(gap_TC, axis=0)
    index = row * num_segments + segment
    store_matrix(grad_ptr + index * num_channels * N, carry_RCW, offset_WCR, valid_WCR)
    tl.store(total_ptr + index * num_channels + channel_C, total_C, mask=valid_C)


@triton.jit(do_not_specialize=["one"])
def scan_backward_kernel(
    dy_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    z_ptr,
    starts_ptr,
    kept_ptr,  # [B, K, programs, R x C x W]: the state before each chunk of CHUNK tiles
    after_ptr,  # [B, S, D, N]: the gradient of the state after each segment
    scratch_ptr,  # [programs, CHUNK, R x C x W]: each program's own, for the states before the tiles of a chunk
    dx_ptr,  # [B, L, D], out, as are ddt and dz
    ddt_ptr,
    dB_ptr,  # [B, L, G, parts, N], out
    dC_ptr,  # [B, L, H, parts, N], out
    dz_ptr,
    dA_ptr,  # [B, S, D, N], out: each segment's sum
    dD_ptr,  # [B, S, D], out, as is dbias
    dbias_ptr,
    dinitial_ptr,  # [B, D, N], out
    length,
    tiles_per_segment,
    num_segments,
    num_channels,
    num_kept,
    one,
    dy_stride_b,
    dy_stride_t,
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
    HAS_AFTER: tl.constexpr,
    CHUNK: tl.constexpr,
    T: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute every gradient, segment by segment, from the states before and the gradients after."""
    blocks_per_head: tl.constexpr = (PER_HEAD + PER_BLOCK - 1) // PER_BLOCK
    head = tl.program_id(0) // blocks_per_head
    channel_block = tl.program_id(0) % blocks_per_head
    segment = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    channel_C, valid_C = channel_offsets(head, channel_block, PER_HEAD, PER_BLOCK)
    offset_WCR, valid_WCR = state_offsets(channel_C, valid_C, one, N, W, R)
    A_RCW = decay_rates(load_matrix(A_ptr, offset_WCR, valid_WCR))
    bias_C = tl.zeros([PER_BLOCK], tl.float32)
    if HAS_BIAS:
        bias_C = tl.load(bias_ptr + channel_C, mask=valid_C, other=0.0)
    D_C = tl.zeros([PER_BLOCK], tl.float32)
    if HAS_D:
        D_C = tl.load(D_ptr + channel_C, mask=valid_C, other=0.0)
    index = row * num_segments + segment
    carry_RCW = tl.zeros([R, PER_BLOCK, W], tl.float32)
    if HAS_AFTER:
        after_ptr += index * num_channels * N
        carry_RCW = load_matrix(after_ptr, offset_WCR, valid_WCR)

    group = head // HEADS_PER_GROUP
    num_heads = num_channels // PER_HEAD
    # Where a program's share of dB and dC goes: its group's and heads' slot, or one part of it.
    parts_B: tl.constexpr = HEADS_PER_GROUP * blocks_per_head
    part_B = (head % HEADS_PER_GROUP) * blocks_per_head + channel_block
    dB_stride_t = num_heads // HEADS_PER_GROUP * parts_B * N
    dC_stride_t = num_heads * blocks_per_head * N
    first = segment.to(tl.int64) * tiles_per_segment * T
    dy_ptr += row * dy_stride_b + first * dy_stride_t
    x_ptr += row * x_stride_b + first * x_stride_t
    dt_ptr += row * dt_stride_b + first * dt_stride_t
    B_ptr += row * B_stride_b + first * B_stride_t + group * N
    C_ptr += row * C_stride_b + first * C_stride_t + head * N
    z_ptr += row * z_stride_b + first * z_stride_t
    dx_ptr += (row * length + first) * num_channels
    ddt_ptr += (row * length + first) * num_channels
    dz_ptr += (row * length + first) * num_channels
    dB_ptr += (row * length + first) * dB_stride_t + (group * parts_B + part_B) * N
    dC_ptr += (row * length + first) * dC_stride_t + (head * blocks_per_head + channel_block) * N
    starts_ptr += row * length + first
    block: tl.constexpr = R * PER_BLOCK * W
    block_WCR = block_offsets(one, PER_BLOCK, W, R)
    scratch_ptr += ((row * num_segments + segment) * tl.num_programs(0) + tl.program_id(0)) * (CHUNK * block)
    kept_stride = (tl.num_programs(0) * block).to(tl.int64)
    kept_ptr += (row * num_kept + segment * tiles_per_segment // CHUNK) * kept_stride + tl.program_id(0) * block
    left = length - first.to(tl.int32)
    state_N = tl.arange(0, W * R)

    dA_RCW = tl.zeros([R, PER_BLOCK, W], tl.float32)
    dD_C = tl.zeros([PER_BLOCK], tl.float32)
    dbias_C = tl.zeros([PER_BLOCK], tl.float32)
    num_tiles = tl.minimum(tiles_per_segment, (left + T - 1) // T)
    num_chunks = (num_tiles + CHUNK - 1) // CHUNK
    for chunk_step in range(0, num_chunks):
        chunk = num_chunks - 1 - chunk_step
        first_tile = chunk * CHUNK
        chunk_tiles = tl.minimum(CHUNK, num_tiles - first_tile)
        # Through the chunk once, to write down the state before each tile; then back.
        state_RCW = tl.permute(tl.load(kept_ptr + chunk * kept_stride + block_WCR), [2, 1, 0])
        tl.store(scratch_ptr + block_WCR, tl.permute(state_RCW, [2, 1, 0]))
        for tile in tl.range(0, chunk_tiles - 1, num_stages=STAGES):
            token_T = (first_tile + tile) * T + tl.arange(0, T)
            x_TC = load_rows(x_ptr, token_T, left, x_stride_t, channel_C, valid_C)
            dt_TC = load_rows(dt_ptr, token_T, left, dt_stride_t, channel_C, valid_C)
            B_TR1W = load_states(B_ptr, token_T, left, B_stride_t, N, W, R)
            delta_TC, gap_TC = load_steps(dt_TC, starts_ptr, token_T, left, bias_C, valid_C, SOFTPLUS, HAS_STARTS)
            decay_TRCW = tl.exp2(gap_TC[:, None, :, None] * A_RCW[None])
            drive_TRCW = pinned(delta_TC * x_TC)[:, None, :, None] * B_TR1W
            state_RCW = last_token(scan_states(decay_TRCW, drive_TRCW, state_RCW))
            tl.store(scratch_ptr + (tile + 1) * block + block_WCR, tl.permute(state_RCW, [2, 1, 0]))
        tl.debug_barrier()
        for step in tl.range(0, chunk_tiles, num_stages=STAGES):
            tile = chunk_tiles - 1 - step
            token_T = (first_tile + tile) * T + tl.arange(0, T)
            state_RCW = tl.permute(tl.load(scratch_ptr + tile * block + block_WCR), [2, 1, 0])
            x_TC = load_rows(x_ptr, token_T, left, x_stride_t, channel_C, valid_C)
            dt_TC = load_rows(dt_ptr, token_T, left, dt_stride_t, channel_C, valid_C)
            dy_TC = load_rows(dy_ptr, token_T, left, dy_stride_t, channel_C, valid_C)
            B_TR1W = load_states(B_ptr, token_T, left, B_stride_t, N, W, R)
            C_TR1W = load_states(C_ptr, token_T, left, C_stride_t, N, W, R)
            delta_TC, gap_TC = load_steps(dt_TC, starts_ptr, token_T, left, bias_C, valid_C, SOFTPLUS, HAS_STARTS)
            drive_TC = pinned(delta_TC * x_TC)
            decay_TRCW = tl.exp2(gap_TC[:, None, :, None] * A_RCW[None])
            state_TRCW, kept_TRCW = scan_states_kept(decay_TRCW, drive_TC[:, None, :, None] * B_TR1W, state_RCW)
            if HAS_Z:
                z_TC = load_rows(z_ptr, token_T, left, z_stride_t, channel_C, valid_C)
                gate_TC = pinned(sigmoid(z_TC))
                ungated_TC = sum_states(state_TRCW * C_TR1W) + D_C[None, :] * x_TC
                dz_TC = dy_TC * ungated_TC * gate_TC * (1.0 + z_TC * (1.0 - gate_TC))
                store_rows(dz_ptr, dz_TC, token_T, left, num_channels, channel_C, valid_C)
                dy_TC *= z_TC * gate_TC
            dy_TRCW = tl.broadcast_to(pinned(dy_TC)[:, None, :, None], state_TRCW.shape)
            dC_TRW = tl.sum(dy_TRCW * state_TRCW, axis=2)
            grad_TRCW, carry_TRCW = scan_grads(decay_TRCW, dy_TRCW * C_TR1W, carry_RCW)
            carry_RCW = first_token(carry_TRCW)
            dB_TRW = tl.sum(grad_TRCW * drive_TC[:, None, :, None], axis=2)
            ddrive_TC = sum_states(grad_TRCW * B_TR1W)
            # The exponent delta A: its gradient is g_t decay_t s_{t-1}, exactly 0 where a document starts.
            dexponent_TRCW = grad_TRCW * kept_TRCW
            dA_RCW += tl.sum(dexponent_TRCW * delta_TC[:, None, :, None], axis=0)
            ddelta_TC = sum_states(dexponent_TRCW * A_RCW[None]) * LN2 + ddrive_TC * x_TC
            ddt_TC = ddelta_TC
            if SOFTPLUS:
                ddt_TC = ddelta_TC * pinned(sigmoid(dt_TC + bias_C[None, :]))
            ddt_TC = tl.where((token_T < left)[:, None], ddt_TC, 0.0)
            store_rows(ddt_ptr, ddt_TC, token_T, left, num_channels, channel_C, valid_C)
            dbias_C += tl.sum(ddt_TC, axis=0)
            dx_TC = ddrive_TC * delta_TC + D_C[None, :] * dy_TC
            store_rows(dx_ptr, dx_TC, token_T, left, num_channels, channel_C, valid_C)
            dD_C += tl.sum(dy_TC * x_TC, axis=0)
            dB_TN = tl.reshape(tl.permute(dB_TRW, [0, 2, 1]), [T, W * R])
            store_rows(dB_ptr, dB_TN, token_T, left, dB_stride_t, state_N, state_N < N)
            dC_TN = tl.reshape(tl.permute(dC_TRW, [0, 2, 1]), [T, W * R])
            store_rows(dC_ptr, dC_TN, token_T, left, dC_stride_t, state_N, state_N < N)
        tl.debug_barrier()

    store_matrix(dA_ptr + index * num_channels * N, dA_RCW, offset_WCR, valid_WCR)
    tl.store(dD_ptr + index * num_channels + channel_C, dD_C, mask=valid_C)
    tl.store(dbias_ptr + index * num_channels + channel_C, dbias_C, mask=valid_C)
    if segment == 0:
        store_matrix(dinitial_ptr + row * num_channels * N, carry_RCW, offset_WCR, valid_WCR)

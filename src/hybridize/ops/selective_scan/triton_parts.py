"""Pieces that the scan's kernels share: tiles, step sizes, the two recurrences inside a tile.

A tile is [T, R, C, W]: T tokens, C channels of one head and N = W x R states, state n at
(n % R, n // R). The axes are in this order because of how a tile is spread over a GPU program: the last axes go to the
lanes of a warp, the next to its warps, and what is left, T and R, to a thread's own registers. So the recurrence runs
inside a thread, and a sum over states is a sum over registers and then over a few lanes.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from triton.language import target_info

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A step size that forgets everything: times any A below, it is far enough under zero for exp2 to give 0.
FORGET = tl.constexpr(1e30)
SLOWEST_DECAY = tl.constexpr(-1e-20)


@triton.jit
def pinned(value_TC):
    """The value itself, each number computed once.

    Triton would rather compute it again in every lane that needs it than send it there; it does not look behind a
    reduction, though, and this one over an axis of one number costs nothing.
    """
    return tl.sum(value_TC[:, :, None], axis=2)


@triton.jit
def log2(value):
    """The GPU's own instruction: its error is 2^-22, absolute."""
    if target_info.is_cuda():
        value = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        value = tl.log2(value)
    return value


@triton.jit
def softplus(value):
    """log(1 + exp(value)), to fp32's relative precision for large and small values too."""
    small = tl.exp2(-tl.abs(value) * LOG2E)
    series = small * (1.0 - small * (0.5 - small * (0.33333334 - small * 0.25)))
    return tl.maximum(value, 0.0) + tl.where(small < 0.03, series, log2(1.0 + small) * LN2)


@triton.jit
def sigmoid(value):
    """1 / (1 + exp(-value))."""
    return 1.0 / (1.0 + tl.exp2(-value * LOG2E))


@triton.jit
def channel_offsets(head, channel_block, PER_HEAD: tl.constexpr, PER_BLOCK: tl.constexpr):
    """Channel numbers [C] of a program, and which of them exist."""
    in_head_C = channel_block * PER_BLOCK + tl.arange(0, PER_BLOCK)
    return head * PER_HEAD + in_head_C, in_head_C < PER_HEAD


@triton.jit
def state_offsets(channel_C, valid_C, one, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """Offsets into a contiguous [D, N] matrix, as a tile [W, C, R], and which of them exist.

    `one` is 1, which the compiler does not know. It would else read neighbouring states in one lane, for speed, and
    then move all of them to where the recurrence needs them, for every tile. With the axes the other way round, and
    no two numbers known to be neighbours, each lane reads its own.
    """
    state_WR = tl.arange(0, W)[:, None] * R + tl.arange(0, R)[None, :]
    offset_WCR = channel_C[None, :, None] * N + state_WR[:, None, :] * one
    valid_WCR = valid_C[None, :, None] & (state_WR[:, None, :] < N)
    return offset_WCR, valid_WCR


@triton.jit
def block_offsets(one, C: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """Offsets [W, C, R] into a program's own block of states, in the order of its lanes."""
    offset_WR = (tl.arange(0, W) * one)[:, None] + (tl.arange(0, R) * (C * W))[None, :]
    return offset_WR[:, None, :] + (tl.arange(0, C) * W)[None, :, None]


@triton.jit
def load_matrix(pointer, offset_WCR, valid_WCR):
    """A [D, N] matrix's share as fp32 [R, C, W]."""
    return tl.permute(tl.load(pointer + offset_WCR, mask=valid_WCR, other=0.0).to(tl.float32), [2, 1, 0])


@triton.jit
def store_matrix(pointer, value_RCW, offset_WCR, valid_WCR):
    """The opposite of `load_matrix`."""
    tl.store(pointer + offset_WCR, tl.permute(value_RCW, [2, 1, 0]), mask=valid_WCR)


@triton.jit
def decay_rates(A):
    """A times log2(e), negative, so that decays are powers of two."""
    return tl.minimum(A, SLOWEST_DECAY) * LOG2E


@triton.jit
def load_rows(pointer, token_T, length, stride_t, channel_C, valid_C):
    """Rows [T, C] of a [L, D] matrix as fp32, 0 past its end."""
    mask_TC = (token_T < length)[:, None] & valid_C[None, :]
    return tl.load(pointer + token_T[:, None] * stride_t + channel_C[None, :], mask=mask_TC, other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, value_TC, token_T, length, stride_t, channel_C, valid_C):
    """The opposite of `load_rows`, in the matrix's dtype."""
    mask_TC = (token_T < length)[:, None] & valid_C[None, :]
    offset_TC = token_T[:, None] * stride_t + channel_C[None, :]
    tl.store(pointer + offset_TC, value_TC.to(pointer.dtype.element_ty), mask=mask_TC)


@triton.jit
def load_steps(dt_TC, starts_ptr, token_T, length, bias_C, valid_C, SOFTPLUS: tl.constexpr, HAS_STARTS: tl.constexpr):
    """Step sizes [T, C] (0 past the end), and the same with FORGET where a document starts."""
    delta_TC = dt_TC + bias_C[None, :]
    if SOFTPLUS:
        delta_TC = softplus(delta_TC)
    delta_TC = tl.where((token_T < length)[:, None] & valid_C[None, :], delta_TC, 0.0)
    delta_TC = pinned(delta_TC)
    gap_TC = delta_TC
    if HAS_STARTS:
        starts_T = tl.load(starts_ptr + token_T, mask=token_T < length, other=0)
        gap_TC = tl.where((starts_T != 0)[:, None], FORGET, delta_TC)
    return delta_TC, gap_TC


@triton.jit
def load_states(pointer, token_T, length, stride_t, N: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """One head's or group's rows of [L, N] as fp32 [T, R, 1, W], 0 past the end."""
    state_RW = tl.arange(0, W)[None, :] * R + tl.arange(0, R)[:, None]
    mask_TRW = (token_T < length)[:, None, None] & (state_RW < N)[None, :, :]
    offset_TRW = token_T[:, None, None] * stride_t + state_RW[None, :, :]
    return tl.load(pointer + offset_TRW, mask=mask_TRW, other=0.0).to(tl.float32)[:, :, None, :]


@triton.jit
def sum_states(value_TRCW):
    """[T, R, C, W] -> [T, C]."""
    return tl.sum(tl.sum(value_TRCW, axis=1), axis=2)


@triton.jit
def _later(value_1, index_1, value_2, index_2):
    take_2 = index_2 > index_1
    return tl.where(take_2, value_2, value_1), tl.where(take_2, index_2, index_1)


@triton.jit
def _earlier(value_1, index_1, value_2, index_2):
    take_2 = index_2 < index_1
    return tl.where(take_2, value_2, value_1), tl.where(take_2, index_2, index_1)


@triton.jit
def _token_index(value_TRCW):
    index_T = tl.arange(0, value_TRCW.shape[0])
    return tl.broadcast_to(index_T[:, None, None, None], value_TRCW.shape)


@triton.jit
def last_token(value_TRCW):
    """[T, R, C, W] -> [R, C, W]; costs nothing where T lies in registers."""
    return tl.reduce((value_TRCW, _token_index(value_TRCW)), 0, _later)[0]


@triton.jit
def first_token(value_TRCW):
    """As `last_token`, the first one."""
    return tl.reduce((value_TRCW, _token_index(value_TRCW)), 0, _earlier)[0]


@triton.jit
def _scan_pair(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def _scan_triple(decay_1, state_1, kept_1, decay_2, state_2, kept_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2, decay_2 * state_1 + kept_2


@triton.jit
def _scan_adjoint(decay_1, carry_1, inner_1, grad_1, decay_2, carry_2, inner_2, grad_2):
    return decay_2 * decay_1, decay_2 * carry_1 + carry_2, inner_2 * decay_1, inner_2 * carry_1 + grad_2


@triton.jit
def scan_states(decay_TRCW, drive_TRCW, state_RCW):
    """States of a tile from the state before it: s_t = decay_t s_{t-1} + drive_t."""
    first = _token_index(drive_TRCW) == 0
    drive_TRCW = tl.where(first, decay_TRCW * state_RCW[None] + drive_TRCW, drive_TRCW)
    return tl.associative_scan((decay_TRCW, drive_TRCW), 0, _scan_pair)[1]


@triton.jit
def scan_states_kept(decay_TRCW, drive_TRCW, state_RCW):
    """States of a tile, and what each token kept of the state before it, decay_t s_{t-1}."""
    first = _token_index(drive_TRCW) == 0
    kept_TRCW = tl.where(first, decay_TRCW * state_RCW[None], 0.0)
    drive_TRCW = tl.where(first, decay_TRCW * state_RCW[None] + drive_TRCW, drive_TRCW)
    scanned = tl.associative_scan((decay_TRCW, drive_TRCW, kept_TRCW), 0, _scan_triple)
    return scanned[1], scanned[2]


@triton.jit
def scan_grads(decay_TRCW, grad_TRCW, carry_RCW):
    """Gradients g_t of a tile's states, from each token's own and that of the state after the tile.

    Also the carries decay_t g_t, the gradients of the states before each token.
    """
    last = _token_index(grad_TRCW) == grad_TRCW.shape[0] - 1
    grad_TRCW = tl.where(last, grad_TRCW + carry_RCW[None], grad_TRCW)
    one_TRCW = tl.full(grad_TRCW.shape, 1.0, tl.float32)
    reverse = (tl.flip(decay_TRCW, 0), tl.flip(decay_TRCW * grad_TRCW, 0), one_TRCW, tl.flip(grad_TRCW, 0))
    scanned = tl.associative_scan(reverse, 0, _scan_adjoint)
    return tl.flip(scanned[3], 0), tl.flip(scanned[1], 0)


@triton.jit
def scan_carry(decay_TRCW, grad_TRCW, carry_RCW):
    """As `scan_grads`, the carries alone."""
    last = _token_index(grad_TRCW) == grad_TRCW.shape[0] - 1
    grad_TRCW = tl.where(last, grad_TRCW + carry_RCW[None], grad_TRCW)
    reverse = (tl.flip(decay_TRCW, 0), tl.flip(decay_TRCW * grad_TRCW, 0))
    return tl.flip(tl.associative_scan(reverse, 0, _scan_pair)[1], 0)

"""A delta rule in chunks of tokens, in plain torch: almost all of the work is matrix products.

Within a chunk that starts from the state S, with decays α, prefix products p_i = α_1 ... α_i and decayed scores
    kk_ij = Σ_channels k_i k_j α_{j+1} ... α_i,    qk_ij likewise,
what each token writes, u, solves a triangular system (the WY form of arXiv 2406.06484, with decays as in
arXiv 2412.06464 and 2510.26692):
    (I + tril(β kk, −1)) u = β (v − (k p) S)  and then  o = (q p) S + tril(qk) u,
and the state after the chunk is p_C S + (k α_{j+1} ... α_C)ᵀ u. Everything but S and u is done for all chunks at once;
they pass from chunk to chunk in a short loop.

Decays are multiplied, never divided, and logarithms never subtracted. So a decay of 0, which is also how a document's
start is written, is exact, nothing can overflow, and no digit is lost where strong and slow decays meet.

Legend: B batch, L length, H heads, G groups of heads, R heads of a group, N chunks, C tokens of a chunk, K width of
queries and keys, V width of values, X batch and heads as one, W = V + K.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

# Tokens of a chunk, a power of two. On a CPU 32 is within a sixth of the best for heads of 32 to 128 channels, while 64
# takes up to half as long again; a GPU does better with fewer, larger products.
_CHUNK_ON_CPU = 32
_CHUNK_ELSEWHERE = 64

# Numbers in the queries of a segment of whole chunks: a longer sequence is worked off segment by segment, and the
# backward pass computes each one again, so that memory grows with the inputs only.
_SEGMENT_NUMEL = 1 << 23


class Scores(NamedTuple):
    """What a chunk's tokens are to one another, to the state before the chunk and to the state after it.

    Attributes:
        qk: decayed products of queries and keys, [N, B, G, R, C, C], 0 above the diagonal.
        kk: decayed products of keys, only read below the diagonal.
        q_in: queries times the decay since before the chunk, [N, B, G, R, C, K].
        k_in: keys, likewise.
        k_out: keys times the decay until after the chunk.
        total: the decay over the whole chunk, [N, B, G, R, K] or [N, B, G, R, 1].
    """

    qk: Tensor
    kk: Tensor
    q_in: Tensor
    k_in: Tensor
    k_out: Tensor
    total: Tensor


ScoreFunction = Callable[[Tensor, Tensor, Tensor], Scores]


def delta_rule_chunked(
    scores: ScoreFunction,
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGV: Tensor,
    g: Tensor,
    beta_BLH: Tensor,
    *,
    scale: float,
    starts_BL: Tensor | None,
    initial_state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run a delta rule over whole sequences.

    Args:
        scores: gives a chunk's `Scores` of queries [N, B, G, R, C, K], keys [N, B, G, 1, C, K] and the decays'
            logarithms [N, B, G, R, C] or [N, B, G, R, C, K], −inf at the start of a document.
        q_BLHK: queries.
        k_BLGK: keys.
        v_BLGV: values.
        g: the decays' logarithms, [B, L, H] or [B, L, H, K].
        beta_BLH: strengths of writing.
        scale: factor of what is read.
        starts_BL: True at the first token of each document.
        initial_state_BHKV: state before the first token; zero by default.

    Returns:
        Outputs [B, L, H, V] in the queries' dtype, and the state after the last token in fp32 (fp64).
    """
    dtype = torch.promote_types(q_BLHK.dtype, torch.float32)
    batch, length, num_heads, key_width = q_BLHK.shape
    if initial_state_BHKV is None:
        state_BHKV = q_BLHK.new_zeros(batch, num_heads, key_width, v_BLGV.shape[-1], dtype=dtype)
    else:
        state_BHKV = initial_state_BHKV.to(dtype)
    chunk = _CHUNK_ON_CPU if q_BLHK.device.type == "cpu" else _CHUNK_ELSEWHERE
    chunk = min(chunk, 1 << (length - 1).bit_length())
    segment = chunk * max(1, _SEGMENT_NUMEL // (batch * chunk * num_heads * key_width))
    run = partial(_run_segment, scores, chunk, scale)
    outputs = []
    for begin in range(0, length, segment):
        part = slice(begin, begin + segment)
        inputs = (
            q_BLHK[:, part],
            k_BLGK[:, part],
            v_BLGV[:, part],
            g[:, part],
            beta_BLH[:, part],
            None if starts_BL is None else starts_BL[:, part],
            state_BHKV,
        )
        with torch.autocast(q_BLHK.device.type, enabled=False):
            if length > segment and torch.is_grad_enabled():
                o, state_BHKV = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                o, state_BHKV = run(*inputs)
        outputs.append(o)
    o_BLHV = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    return o_BLHV.to(q_BLHK.dtype), state_BHKV


def _run_segment(
    scores: ScoreFunction,
    chunk: int,
    scale: float,
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGV: Tensor,
    g: Tensor,
    beta_BLH: Tensor,
    starts_BL: Tensor | None,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run all chunks of a segment; tokens that are missing in the last one write nothing and keep the state."""
    dtype = state_BHKV.dtype
    length, num_groups, value_width = q_BLHK.shape[1], k_BLGK.shape[2], v_BLGV.shape[-1]
    missing = -length % chunk

    def cut(tensor: Tensor) -> Tensor:
        """[B, L, heads or groups, ...] -> [N, B, G, R or 1, C, ...], contiguous."""
        tensor = tensor.to(dtype)
        if missing:
            tensor = pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing))
        tensor = tensor.unflatten(1, (-1, chunk)).unflatten(3, (num_groups, -1))  # [B, N, C, G, R or 1, ...]
        return tensor.movedim((1, 0, 3, 4, 2), (0, 1, 2, 3, 4)).contiguous()

    if starts_BL is not None:
        g = g.masked_fill(starts_BL.view(*starts_BL.shape, *[1] * (g.ndim - 2)), -torch.inf)
    beta = cut(beta_BLH).unsqueeze(-1)
    parts = scores(cut(q_BLHK), cut(k_BLGK), cut(g))
    right = torch.cat([beta * cut(v_BLGV), beta * parts.k_in], dim=-1)
    solved_NXCW = solve_unit_lower((beta * parts.kk).flatten(1, 3), right.flatten(1, 3))
    free_NXCV, bound_NXCK = solved_NXCW.split([value_width, solved_NXCW.shape[-1] - value_width], dim=-1)
    before_NXKV, written_NXCV, end_XKV = pass_states(
        free_NXCV, bound_NXCK, parts.k_out.flatten(1, 3), parts.total.flatten(1, 3), state_BHKV.flatten(0, 1)
    )
    o_NXCV = parts.q_in.flatten(1, 3) @ before_NXKV + parts.qk.flatten(1, 3) @ written_NXCV
    o_BNCHV = o_NXCV.unflatten(1, state_BHKV.shape[:2]).permute(1, 0, 3, 2, 4)
    return scale * o_BNCHV.flatten(1, 2)[:, :length], end_XKV.view_as(state_BHKV)


def solve_unit_lower(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve (I + tril(matrix, −1)) x = right.

    Args:
        matrix: [..., C, C], only read below the diagonal.
        right: [..., C, W].

    Returns:
        x, [..., C, W].
    """
    return _SolveUnitLower.apply(matrix, right)


def pass_states(
    free_NXCV: Tensor, bound_NXCK: Tensor, k_out_NXCK: Tensor, total: Tensor, state_XKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass a state S from chunk to chunk: u = free − bound S, then S ← Diag(total) S + k_outᵀ u.

    Args:
        free_NXCV: what each token would write if the state before its chunk were zero.
        bound_NXCK: at which keys it takes that state into account.
        k_out_NXCK: keys times the decay until after the chunk.
        total: the decay over a chunk, [N, X, K] or [N, X, 1].
        state_XKV: the state before the first chunk.

    Returns:
        The states before each chunk, [N, X, K, V], what each token writes, [N, X, C, V], and the state after the last.
    """
    return _PassStates.apply(free_NXCV, bound_NXCK, k_out_NXCK, total, state_XKV)


class _SolveUnitLower(torch.autograd.Function):
    """Inverts the small matrices, so that all the rest, gradients too, is products."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, right: Tensor) -> Tensor:
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(matrix, identity, upper=False, unitriangular=True)
        solved = inverse @ right
        ctx.save_for_backward(inverse, solved)
        return solved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(grad.device.type, enabled=False):
            inverse, solved = ctx.saved_tensors
            grad_right = inverse.transpose(-1, -2) @ grad
            return -(grad_right @ solved.transpose(-1, -2)).tril(-1), grad_right


class _PassStates(torch.autograd.Function):
    """A loop of two products a chunk, forward and backward; all that no state waits for is done after it at once."""

    @staticmethod
    def forward(
        ctx: Any, free_NXCV: Tensor, bound_NXCK: Tensor, k_out_NXCK: Tensor, total: Tensor, state_XKV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        before_NXKV = state_XKV.new_empty(len(free_NXCV), *state_XKV.shape)
        written_NXCV = torch.empty_like(free_NXCV, memory_format=torch.contiguous_format)
        k_out_NXKC = k_out_NXCK.transpose(-1, -2)
        for n, (free, bound, k_out, kept) in enumerate(
            zip(free_NXCV, bound_NXCK, k_out_NXKC, total.unsqueeze(-1), strict=True)
        ):
            before_NXKV[n] = state_XKV
            written = torch.baddbmm(free, bound, state_XKV, alpha=-1, out=written_NXCV[n])
            state_XKV = torch.baddbmm(kept * state_XKV, k_out, written)
        ctx.save_for_backward(bound_NXCK, k_out_NXCK, total, before_NXKV, written_NXCV)
        return before_NXKV, written_NXCV, state_XKV

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_before_NXKV: Tensor, grad_written_NXCV: Tensor, grad_state_XKV: Tensor
    ) -> tuple[Tensor, ...]:
        with torch.autocast(grad_state_XKV.device.type, enabled=False):
            bound_NXCK, k_out_NXCK, total, before_NXKV, written_NXCV = ctx.saved_tensors
            grad_free_NXCV, grad_k_out_NXCK = torch.empty_like(written_NXCV), torch.empty_like(k_out_NXCK)
            kept_NXK1, bound_NXKC = total.unsqueeze(-1), bound_NXCK.transpose(-1, -2)
            sums = []
            for n in range(len(before_NXKV) - 1, -1, -1):
                torch.bmm(written_NXCV[n], grad_state_XKV.transpose(-1, -2), out=grad_k_out_NXCK[n])
                sums.append((grad_state_XKV * before_NXKV[n]).sum(dim=-1))
                grad_free = torch.baddbmm(grad_written_NXCV[n], k_out_NXCK[n], grad_state_XKV, out=grad_free_NXCV[n])
                grad_kept = torch.addcmul(grad_before_NXKV[n], kept_NXK1[n], grad_state_XKV)
                grad_state_XKV = torch.baddbmm(grad_kept, bound_NXKC[n], grad_free, alpha=-1)
            grad_total = torch.stack(sums[::-1])
            return (
                grad_free_NXCV,
                -(grad_free_NXCV @ before_NXKV.transpose(-1, -2)),
                grad_k_out_NXCK,
                grad_total if total.shape[-1] > 1 else grad_total.sum(dim=-1, keepdim=True),
                grad_state_XKV,
            )

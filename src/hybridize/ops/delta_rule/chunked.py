"""A delta rule in chunks of tokens, in plain torch: almost all of the work is matrix products.

Within a chunk that starts from the state S, with decays α, prefix products p_i = α_1 ... α_i and decayed scores
    kk_ij = Σ_channels k_i k_j α_{j+1} ... α_i,    qk_ij likewise,
what each token writes, u, solves a triangular system (the WY form of arXiv 2406.06484, with decays as in
arXiv 2412.06464 and 2510.26692):
    (I + tril(β kk, −1)) u = β (v − (k p) S)  and then  o = (q p) S + tril(qk) u,
and the state after the chunk is p_C S + (k α_{j+1} ... α_C)ᵀ u. Everything but the state of S is done for all chunks
at once; S itself passes from chunk to chunk in a short loop.

Decays are multiplied, never divided, and logarithms never subtracted: products over a stretch of tokens are built
from those over its halves. So a decay of 0, which is also how a document's start is written, is exact, nothing can
overflow, and no digit is lost where strong and slow decays meet.

Legend: B batch, L length, H heads, G groups of heads, R heads of a group, N chunks, C tokens of a chunk, K width of
queries and keys, V width of values.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

# Tokens of a chunk, a power of two. On a CPU 16, 32 and 64 are within a fifth of one another for heads of 16 to 128
# channels, and 32 is best on the whole; a GPU does better with fewer, larger products.
_CHUNK_ON_CPU = 32
_CHUNK_ELSEWHERE = 64

# Numbers in the queries of a segment of whole chunks: a longer sequence is worked off segment by segment, and the
# backward pass computes each one again, so that memory grows with the inputs only.
_SEGMENT_NUMEL = 1 << 23


class Scores(NamedTuple):
    """What a chunk's tokens are to one another, to the state before the chunk and to the state after it.

    Attributes:
        qk: decayed products of queries and keys, [B, G, R, N, C, C], 0 above the diagonal.
        kk: decayed products of keys, only read below the diagonal.
        q_in: queries times the decay since before the chunk, [B, G, R, N, C, K].
        k_in: keys, likewise.
        k_out: keys times the decay until after the chunk.
        total: the decay over the whole chunk, [B, G, R, N, K] or [B, G, R, N, 1].
    """

    qk: Tensor
    kk: Tensor
    q_in: Tensor
    k_in: Tensor
    k_out: Tensor
    total: Tensor


ScoreFunction = Callable[[Tensor, Tensor, Tensor], Scores]


def join_halves(first: Tensor, second: Tensor, below: Tensor) -> Tensor:
    """Lower triangular matrices of twice the size: `first`, `second` on the diagonal, `below` under it."""
    upper = pad(first, (0, second.shape[-1]))
    return torch.cat([upper, torch.cat([below, second], dim=-1)], dim=-2)


def halves(tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Split stretches along `dim`, counted from the end, into first halves (even places) and second (odd ones)."""
    first, second = tensor.unflatten(dim, (-1, 2)).unbind(dim)
    return first, second


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
        scores: gives a chunk's `Scores` of queries [B, G, R, N, C, K], keys [B, G, 1, N, C, K] and decays
            [B, G, R, N, C] or [B, G, R, N, C, K].
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
    decay = torch.exp(g.to(dtype))
    if starts_BL is not None:
        decay = decay.masked_fill(starts_BL.view(*starts_BL.shape, *[1] * (decay.ndim - 2)), 0.0)
    missing = -length % chunk

    def cut(tensor: Tensor, fill: float = 0.0) -> Tensor:
        """[B, L, heads or groups, ...] -> [B, G, R or 1, N, C, ...], contiguous."""
        tensor = tensor.to(dtype)
        if missing:
            tensor = pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing), value=fill)
        return tensor.unflatten(1, (-1, chunk)).movedim(3, 1).unflatten(1, (num_groups, -1)).contiguous()

    q, k, v, beta = cut(q_BLHK), cut(k_BLGK), cut(v_BLGV), cut(beta_BLH).unsqueeze(-1)
    parts = scores(q, k, cut(decay, fill=1.0))
    right = torch.cat([beta * v, beta * parts.k_in], dim=-1)
    solved = torch.linalg.solve_triangular(beta * parts.kk, right, upper=False, unitriangular=True)
    free, bound = solved.flatten(1, 2).split([value_width, solved.shape[-1] - value_width], dim=-1)
    k_out_BHNKC = parts.k_out.flatten(1, 2).transpose(-1, -2)
    total_BHNK1 = parts.total.flatten(1, 2).unsqueeze(-1)
    before, written = [], []
    for free_c, bound_c, k_out_c, total_c in zip(
        free.unbind(2), bound.unbind(2), k_out_BHNKC.unbind(2), total_BHNK1.unbind(2), strict=True
    ):
        before.append(state_BHKV)
        written.append(free_c - bound_c @ state_BHKV)
        state_BHKV = total_c * state_BHKV + k_out_c @ written[-1]
    o_BHNCV = parts.q_in.flatten(1, 2) @ torch.stack(before, dim=2)
    o_BHNCV = o_BHNCV + parts.qk.flatten(1, 2) @ torch.stack(written, dim=2)
    return scale * o_BHNCV.movedim(1, 3).flatten(1, 2)[:, :length], state_BHKV

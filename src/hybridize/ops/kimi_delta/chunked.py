"""Kimi delta attention in chunks: with a decay per channel, scores are built up from stretches of 1, 2, 4, ... tokens.

Where the first half of a stretch meets the second, the decay between two tokens is that from the one to the middle
times that from the middle to the other, so that a product of two matrices does it for all pairs at once.

Legend: B batch, L length, H heads, G groups of heads, R heads of a group, N chunks, C tokens of a chunk, K width of
queries and keys, V width of values; in `_scores` S stretches of T tokens, and 2 for queries and keys.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybridize.ops.delta_rule.chunked import Scores, delta_rule_chunked


def _scores(q_NBGRCK: Tensor, k_NBG1CK: Tensor, g_NBGRCK: Tensor) -> Scores:
    """Score a chunk's tokens, from stretches of one token (T = 1) up to the whole chunk (S = 1)."""
    alpha_NBGRCK, k_NBGRCK = torch.exp(g_NBGRCK), k_NBG1CK.expand_as(q_NBGRCK)
    rows = torch.stack([q_NBGRCK, k_NBGRCK], dim=-3)  # [N, B, G, R, 2, C, K]
    scores = (rows * k_NBGRCK.unsqueeze(-3)).sum(dim=-1)[..., None, None]  # [N, B, G, R, 2, S, T, T]
    rows_in = (rows * alpha_NBGRCK.unsqueeze(-3)).unsqueeze(-2)  # times the decay since before the stretch
    k_out = k_NBGRCK.unsqueeze(-2)  # times the decay until after the stretch
    total = alpha_NBGRCK  # over the stretch, [N, B, G, R, S, K]
    while total.shape[-2] > 1:
        rows_1, rows_2 = halves(rows_in, -3)
        k_1, k_2 = halves(k_out, -3)
        total_1, total_2 = halves(total, -2)
        scores_1, scores_2 = halves(scores, -3)
        scores = join_halves(scores_1, scores_2, rows_2 @ k_1.unsqueeze(-4).transpose(-1, -2))
        rows_in = torch.cat([rows_1, rows_2 * total_1[..., None, :, None, :]], dim=-2)
        k_out = torch.cat([k_1 * total_2.unsqueeze(-2), k_2], dim=-2)
        total = total_1 * total_2
    qk, kk = scores.squeeze(-3).unbind(-3)
    q_in, k_in = rows_in.squeeze(-3).unbind(-3)
    return Scores(qk, kk, q_in, k_in, k_out.squeeze(-3), total.squeeze(-2))


def join_halves(first: Tensor, second: Tensor, below: Tensor) -> Tensor:
    """Lower triangular matrices of twice the size: `first`, `second` on the diagonal, `below` under it."""
    upper = pad(first, (0, second.shape[-1]))
    return torch.cat([upper, torch.cat([below, second], dim=-1)], dim=-2)


def halves(tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Split stretches along `dim`, counted from the end, into first halves (even places) and second (odd ones)."""
    first, second = tensor.unflatten(dim, (-1, 2)).unbind(dim)
    return first, second


kimi_delta_attention_chunked = partial(delta_rule_chunked, _scores)

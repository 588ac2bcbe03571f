"""The gated delta rule in chunks: with one decay per head, scores are plain products times a matrix of decays.

Legend: B batch, L length, H heads, G groups of heads, R heads of a group, N chunks, C tokens of a chunk, K width of
queries and keys, V width of values.
"""

from functools import partial

import torch
from torch import Tensor

from hybridize.ops.delta_rule.chunked import Scores, delta_rule_chunked, halves, join_halves


def _scores(q_BGRNCK: Tensor, k_BG1NCK: Tensor, alpha_BGRNC: Tensor) -> Scores:
    """Score a chunk's tokens, keys once for all heads of a group."""
    between, since_start, until_end = decay_products(alpha_BGRNC)
    keys_across = k_BG1NCK.transpose(-1, -2)
    return Scores(
        qk=(q_BGRNCK @ keys_across) * between,
        kk=(k_BG1NCK @ keys_across) * between,
        q_in=q_BGRNCK * since_start.unsqueeze(-1),
        k_in=k_BG1NCK * since_start.unsqueeze(-1),
        k_out=k_BG1NCK * until_end.unsqueeze(-1),
        total=since_start[..., -1:],
    )


def decay_products(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply decays over all stretches of tokens of a chunk.

    Args:
        alpha: decays, [..., C]; C is a power of two.

    Returns:
        α_{j+1} ... α_i in row i and column j, 0 above the diagonal, [..., C, C]; α_1 ... α_i, [..., C];
        α_{j+1} ... α_C, [..., C].
    """
    # One matrix and two vectors for each stretch of 1, 2, 4, ... tokens: [..., stretches, (tokens,) tokens].
    prefix = alpha.unsqueeze(-1)
    suffix, between = torch.ones_like(prefix), torch.ones_like(prefix).unsqueeze(-1)
    while prefix.shape[-2] > 1:
        prefix_1, prefix_2 = halves(prefix, -2)
        suffix_1, suffix_2 = halves(suffix, -2)
        between_1, between_2 = halves(between, -3)
        between = join_halves(between_1, between_2, prefix_2.unsqueeze(-1) * suffix_1.unsqueeze(-2))
        prefix, suffix = (
            torch.cat([prefix_1, prefix_2 * prefix_1[..., -1:]], dim=-1),
            torch.cat([suffix_1 * prefix_2[..., -1:], suffix_2], dim=-1),
        )
    return between.squeeze(-3), prefix.squeeze(-2), suffix.squeeze(-2)


gated_delta_rule_chunked = partial(delta_rule_chunked, _scores)

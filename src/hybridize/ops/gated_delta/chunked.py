"""The gated delta rule in chunks: with one decay per head, scores are plain products times a matrix of decays.

Legend: B batch, L length, H heads, G groups of heads, R heads of a group, N chunks, C tokens of a chunk, K width of
queries and keys, V width of values.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.ops.delta_rule.chunked import Scores, delta_rule_chunked


def _scores(q_NBGRCK: Tensor, k_NBG1CK: Tensor, g_NBGRC: Tensor) -> Scores:
    """Score a chunk's tokens, keys once for all heads of a group."""
    between, since_start = decay_products(g_NBGRC)
    keys_across = k_NBG1CK.transpose(-1, -2)
    q_times_k = (q_NBGRCK.flatten(3, 4).unsqueeze(3) @ keys_across).view_as(between)
    return Scores(
        qk=q_times_k * between,
        kk=(k_NBG1CK @ keys_across) * between,
        q_in=q_NBGRCK * since_start.unsqueeze(-1),
        k_in=k_NBG1CK * since_start.unsqueeze(-1),
        k_out=k_NBG1CK * between[..., -1, :].unsqueeze(-1),
        total=since_start[..., -1:],
    )


def decay_products(g: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply decays over all stretches of tokens of a chunk.

    Args:
        g: the decays' logarithms, [..., C].

    Returns:
        α_{j+1} ... α_i in row i and column j, 0 above the diagonal, [..., C, C]; α_1 ... α_i, [..., C].
    """
    return _DecayProducts.apply(g)


class _DecayProducts(torch.autograd.Function):
    """A product's gradient on the logarithm of each of its factors is the product: no division, exact at 0."""

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        alpha = torch.exp(g)
        num_tokens = g.shape[-1]
        factors = alpha.unsqueeze(-1).expand(*g.shape, num_tokens).tril(-1)
        factors += torch.ones_like(factors[(0,) * (g.ndim - 1)]).triu()
        between = factors.cumprod(dim=-2).tril_()
        since_start = between[..., 0] * alpha[..., :1]
        ctx.save_for_backward(between, since_start)
        return between, since_start

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_between: Tensor, grad_since_start: Tensor) -> Tensor:
        with torch.autocast(grad_between.device.type, enabled=False):
            between, since_start = ctx.saved_tensors
            # What a stretch from j + 1 to i gives goes to all tokens in it: sums over columns j < m and rows i >= m.
            given = grad_between * between
            ones = torch.ones_like(given[(0,) * (given.ndim - 2)])
            before = given @ ones.triu(1)  # [..., i, m]: sum over j < m
            before += (grad_since_start * since_start).unsqueeze(-1)
            return before.mul_(ones.tril()).sum(dim=-2)


gated_delta_rule_chunked = partial(delta_rule_chunked, _scores)

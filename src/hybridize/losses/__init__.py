"""Distances between next-token distributions, in nat per token, without logits of the whole batch.

`linear_divergence` is what training and ranking call: it starts from final hidden states and output heads.
`dense_divergence` is the same quantity written as in the papers; it is the truth the tests compare with.
"""

from hybridize.losses.divergence import KINDS, Kind, Reduction, dense_divergence
from hybridize.losses.linear import linear_divergence

__all__ = ["KINDS", "Kind", "Reduction", "dense_divergence", "linear_divergence"]

"""Weights of RMS norms as Qwen 3.5 stores them: less 1, which not every weight survives in a short dtype.

bf16 holds 0.0123 and 1 - 0.0123 equally many digits, of which the latter spends most on the leading 0.98. Where the
difference from 1 would be rounded, the weight is split into a power of two and a rest that survives; the power of two
goes where the norm's output goes.

Legend: D channels of a head, P = D / 2 pairs of channels that the rotary embedding turns together.
"""

import torch
from torch import Tensor

from hybridize.ops.precision import at_least_fp32

# Powers of two that are tried for a pair of channels, the smallest first.
_SHIFTS = sorted(range(-16, 17), key=abs)


def less_one(weight: Tensor) -> Tensor:
    """A weight less 1, in its dtype."""
    return (at_least_fp32(weight) - 1).to(weight.dtype)


def survives(weight: Tensor) -> Tensor:
    """Whether each weight comes back bit for bit when 1 is added in fp32 to what is stored."""
    return (at_least_fp32(less_one(weight)) + 1) == at_least_fp32(weight)


def split_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split the weight of a norm that linear layers follow.

    Returns:
        What is stored for the norm, in the weight's dtype; and the power of two, with a sign, by which the following
        layers' columns are multiplied, fp32: 1 wherever the weight survives by itself.
    """
    mantissa, exponent = torch.frexp(at_least_fp32(weight))
    factor = torch.ldexp(mantissa.sign(), exponent - 1)  # the rest is in [1, 2)
    factor = torch.where(survives(weight), torch.ones_like(factor), factor)
    return less_one((at_least_fp32(weight) / factor).to(weight.dtype)), factor


def split_pair(query_D: Tensor, key_D: Tensor) -> tuple[Tensor, Tensor, int]:
    """Split the weights of the norms of queries and keys, which a rotary embedding and their product follow.

    The rotary embedding turns channels i and i + D/2 together. So both channels of a pair may be scaled by a number in
    the queries and by its inverse in the keys.

    Returns:
        What is stored for both norms; and how many weights are rounded, since no power of two helps their pair.
    """
    half = query_D.shape[0] // 2
    pairs_4P = at_least_fp32(torch.stack([query_D[:half], query_D[half:], key_D[:half], key_D[half:]]))
    shift_P = torch.zeros(half)
    open_P = torch.ones(half, dtype=torch.bool)
    sides_41 = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    for shift in _SHIFTS:
        fits_P = survives((pairs_4P * torch.exp2(shift * sides_41)).to(query_D.dtype)).all(dim=0)
        shift_P = torch.where(open_P & fits_P, float(shift), shift_P)
        open_P = open_P & ~fits_P
    moved_4P = (pairs_4P * torch.exp2(shift_P * sides_41)).to(query_D.dtype)
    stored_4P = less_one(moved_4P)
    query, key = stored_4P[:2].flatten(), stored_4P[2:].flatten()
    return query, key, int((~survives(moved_4P)).sum())

"""The ways to make one tensor of several, each a function in one table, computed in fp32 a chunk at a time.

Shapes: N entries of a flattened tensor, C of a chunk. Tensors come in the precision that they are stored in and may
lie in a mapped file: what is held in memory beside the result is a few chunks, however large the tensor.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Entries computed at a time; as fast as larger ones, and their memory leaves no holes between the results."""

PARALLEL = 1e-4
"""Sine of an angle below which `slerp` is `linear`: their weights then differ by less than fp32 can tell."""

Counts = dict[str, int]
Combine = Callable[[Sequence[Tensor], Tensor | None, Sequence[float], float], tuple[Tensor, Counts]]


@dataclass(frozen=True)
class Method:
    """One row: a way to merge.

    Attributes:
        combine: makes one flat tensor [N] of several, given the base's, the weights (which sum to 1) and the density;
            returns it in the first one's dtype, with what there was to count.
        paper: where it comes from.
        needs_base: whether it takes the common starting point of its sources; others take none.
        num_sources: how many it takes; None: two or more.
    """

    combine: Combine
    paper: str
    needs_base: bool = False
    num_sources: int | None = None


def linear(
    sources: Sequence[Tensor], base_N: Tensor | None, weights: Sequence[float], density: float
) -> tuple[Tensor, Counts]:
    """The weighted mean, as arXiv 2203.05482 takes it of fine-tuned models.

    Computed as the heaviest source plus weighted differences from it, so that entries on which all sources agree keep
    their bits whatever the weights, and a weight of 1 gives that source.
    """
    anchor = max(range(len(sources)), key=lambda i: weights[i])
    out_N = torch.empty_like(sources[0])
    for part in chunks(out_N.numel()):
        start_C = wide(sources[anchor][part])
        total_C = start_C.clone()
        for i, (source_N, weight) in enumerate(zip(sources, weights, strict=True)):
            if i != anchor and weight:
                total_C += weight * (wide(source_N[part]) - start_C)
        out_N[part] = total_C
    return out_N, {}


def slerp(
    sources: Sequence[Tensor], base_N: Tensor | None, weights: Sequence[float], density: float
) -> tuple[Tensor, Counts]:
    """Spherical linear interpolation (Shoemake 1985, Animating rotation with quaternion curves) of two tensors.

    Each tensor is one vector. With Ω the angle between the two and t the second's weight, the result is
    sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b; vectors of one norm stay on their sphere. Where the arc is not defined,
    or is a straight line to within rounding, the result is that of `linear`: a vector of norm 0, and vectors that are
    parallel or opposite to within `PARALLEL`.
    """
    first_N, second_N = sources
    norm_a = norm_b = dot = 0.0
    for part in chunks(first_N.numel()):
        a_C, b_C = first_N[part].double(), second_N[part].double()
        norm_a, norm_b, dot = norm_a + a_C.dot(a_C).item(), norm_b + b_C.dot(b_C).item(), dot + a_C.dot(b_C).item()
    norm = math.sqrt(norm_a) * math.sqrt(norm_b)
    angle = math.acos(max(-1.0, min(1.0, dot / norm))) if norm > 0 else 0.0
    if not math.sin(angle) > PARALLEL:
        out_N, counts = linear(sources, base_N, weights, density)
        return out_N, counts | {"num_linear": 1}
    share_a, share_b = (math.sin(weight * angle) / math.sin(angle) for weight in weights)
    out_N = torch.empty_like(first_N)
    for part in chunks(out_N.numel()):
        out_N[part] = share_a * wide(first_N[part]) + share_b * wide(second_N[part])
    return out_N, {"num_linear": 0}


def ties(
    sources: Sequence[Tensor], base_N: Tensor | None, weights: Sequence[float], density: float
) -> tuple[Tensor, Counts]:
    """Trim, elect sign, merge disjointly (arXiv 2306.01708), with the paper's scale λ = 1.

    Of each source's difference from the base, the entries of largest magnitude are kept (here per tensor; those as
    large as the smallest one kept are kept too). The sign of each entry is that of the weighted sum of what is left.
    The result is the base plus the weighted mean of the kept differences that have this sign; where none has, or the
    sum is 0, it is the base.

    Counts `num_kept` entries, of all sources together, and `num_conflicts`: entries where kept signs differ.
    """
    assert base_N is not None
    smallest = [_smallest_kept(source_N, base_N, density) for source_N in sources]
    out_N = torch.empty_like(sources[0])
    num_kept = num_conflicts = 0
    for part in chunks(out_N.numel()):
        base_C = wide(base_N[part])
        kept = []
        for source_N, least in zip(sources, smallest, strict=True):
            delta_C = wide(source_N[part]) - base_C
            kept.append(delta_C.masked_fill_(delta_C.float().abs() < least, 0))
            num_kept += int(kept[-1].count_nonzero())
        mass_C = sum((weight * delta_C for weight, delta_C in zip(weights, kept, strict=True)), torch.zeros(()))
        sign_C = mass_C.sign()
        total_C, share_C = torch.zeros_like(base_C), torch.zeros_like(base_C)
        for weight, delta_C in zip(weights, kept, strict=True):
            agrees_C = (delta_C.sign() == sign_C) & (delta_C != 0)
            total_C += weight * delta_C * agrees_C
            share_C += weight * agrees_C
        out_N[part] = base_C + torch.where(share_C > 0, total_C / share_C, 0)
        stacked = torch.stack(kept)
        num_conflicts += int(((stacked > 0).any(0) & (stacked < 0).any(0)).count_nonzero())
    return out_N, {"num_kept": num_kept, "num_conflicts": num_conflicts}


METHODS: dict[str, Method] = {
    "linear": Method(linear, "arXiv 2203.05482"),
    "slerp": Method(slerp, "Shoemake 1985", num_sources=2),
    "ties": Method(ties, "arXiv 2306.01708", needs_base=True),
}


def chunks(total: int) -> Iterator[slice]:
    """Slices that cover `total` entries, in order."""
    for start in range(0, total, CHUNK):
        yield slice(start, min(start + CHUNK, total))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32 (float64 stays)."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _smallest_kept(source_N: Tensor, base_N: Tensor, density: float) -> float:
    """The magnitude of the smallest difference that trimming keeps: the k-th largest, exactly, without sorting.

    Magnitudes in fp32 are in the order of their bits as integers. One pass counts them by their upper 16 bits, which
    tells where the k-th is; a second one counts, among those with the same upper bits, by the lower 16.
    """
    rank = max(1, round(density * source_N.numel()))
    prefix = 0
    for level in (0, 1):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for part in chunks(source_N.numel()):
            bits_C = (wide(source_N[part]) - wide(base_N[part])).float().abs().view(torch.int32)
            digit_C = bits_C >> 16 if level == 0 else bits_C[bits_C >> 16 == prefix] & 0xFFFF
            counts += digit_C.bincount(minlength=1 << 16)
        from_top = counts.flip(0).cumsum(0)
        position = int(torch.searchsorted(from_top, rank))
        rank -= int(from_top[position - 1]) if position else 0
        prefix = prefix << 16 | (1 << 16) - 1 - position
    return torch.tensor(prefix, dtype=torch.int32).view(torch.float32).item()

"""What a mixer is given where attention has no counterpart and it is to be as near to linear attention as it can.

Decays are the same for every token: each query head averages over a memory of its own, from 16 to 4096 tokens. The
convolution passes the newest token on. The gate is the same for every token where its form allows.
"""

import math
from collections.abc import Iterable

from hybridize.spec import AttentionGeometry
from hybridize.transfer.expressions import Blend, Constant, Expression, Take

# Tokens after which a head has forgotten all but 1/e, of the head that forgets first and of the one that does last.
SHORTEST_MEMORY, LONGEST_MEMORY = 16, 4096

# SiLU of this is 1.
SILU_OPEN = 1.2784645427610738

MEMORIES = (
    f"inverse softplus of step sizes 1/memory, memories log-uniform in [{SHORTEST_MEMORY}, {LONGEST_MEMORY}] tokens "
    "over the query heads"
)


def memory_lengths(geometry: AttentionGeometry, query_heads: Iterable[int]) -> tuple[float, ...]:
    """A memory in tokens for each of the teacher's query heads that is named.

    Log-uniform over the query heads, so that the heads of every key/value head have short ones and long ones.
    """
    lengths = []
    for head in query_heads:
        kv_head, member = divmod(head, geometry.group_size)
        rank = member * geometry.num_kv_heads + kv_head
        share = rank / (geometry.num_heads - 1) if geometry.num_heads > 1 else 0.5
        lengths.append(SHORTEST_MEMORY * (LONGEST_MEMORY / SHORTEST_MEMORY) ** share)
    return tuple(lengths)


def step_bias(memory: float) -> float:
    """What softplus takes to the step size 1 / memory."""
    step = 1 / memory
    return step + math.log(-math.expm1(-step))


def newest_tap(num_channels: int, num_taps: int, weight: float = 1.0) -> Constant:
    """A convolution that reads the token itself only, times `weight`: [channels, 1, taps]."""
    words = f"{weight:g} at the newest tap, 0 elsewhere"
    return Constant(weight, (num_channels, 1, num_taps), words, newest=True)


def open_silu(width: int) -> Constant:
    """The bias of a gate that SiLU takes to 1: [width]."""
    return Constant(SILU_OPEN, (width,), f"{SILU_OPEN:.4f}, which SiLU takes to 1")


def reorder_norm(factor: Expression, order: tuple[int, ...] | None, why: str) -> Expression:
    """A norm's factor with its channels in another order."""
    if isinstance(factor, Take):
        return factor.reorder(order, why)
    if isinstance(factor, Blend):
        return Blend(tuple((weight, reorder_norm(part, order, why)) for weight, part in factor.parts))
    return factor  # one number for all channels

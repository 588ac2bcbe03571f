"""Which scan head stands for which slice of which query head.

A scan with state size N sees attention of head width D through slices of N channels. It has H = heads·D/N
heads and G = kv_heads·D/N groups; scan head m reads x and B of group m // (H/G). Values and keys lie in
order, so group g is key/value head g // (D/N), slice g % (D/N). The teacher pairs query head h with key/value
head h // group_size; a scan head is *aligned* if its C comes from a query head of that key/value head, and
from the slice that its B comes from.

Mamba-in-Llama (arXiv 2408.15237) leaves queries in order too, which pairs heads right but mostly slices wrong
unless N = D. The aligned order permutes rows of the queries, and columns of the output projection, so that
all agree.
"""

from hybridize.spec import AttentionGeometry


def check_slices(
    geometry: AttentionGeometry,
    state_size: int,
    place: str = "mixer.state_size",
    otherwise: str = "init 'published' or 'random'",
) -> int:
    """Return the number of slices per head, D/N.

    Args:
        geometry: of the teacher's attention.
        state_size: N.
        place: what to call N in errors.
        otherwise: what else may help.

    Raises:
        ValueError: N does not divide D.
    """
    if geometry.head_dim % state_size:
        raise ValueError(
            f"{place}: {state_size} does not divide the teacher's head width {geometry.head_dim}, so no head of the "
            f"mixer can stand for a slice of a query head; use a divisor of {geometry.head_dim}, or {otherwise}"
        )
    return geometry.head_dim // state_size


def aligned_order(geometry: AttentionGeometry, state_size: int) -> tuple[int, ...]:
    """The query channel that each scan channel stands for, in aligned order.

    Args:
        geometry: of the teacher's attention.
        state_size: N; divides the head width.

    Returns:
        heads·D indices into the rows of the query projection, and into the columns of the output projection.
    """
    num_slices = check_slices(geometry, state_size)
    order: list[int] = []
    for group in range(geometry.num_kv_heads * num_slices):
        kv_head, part = divmod(group, num_slices)
        for head in range(kv_head * geometry.group_size, (kv_head + 1) * geometry.group_size):
            first = head * geometry.head_dim + part * state_size
            order.extend(range(first, first + state_size))
    return tuple(order)


def count_aligned(geometry: AttentionGeometry, state_size: int, order: tuple[int, ...] | None) -> tuple[int, int]:
    """Count the aligned scan heads.

    Args:
        geometry: of the teacher's attention.
        state_size: N; divides the head width.
        order: the query channel of each scan channel; None for queries as they lie.

    Returns:
        The number of aligned scan heads and of all.
    """
    num_slices = check_slices(geometry, state_size)
    num_channels = geometry.num_heads * geometry.head_dim
    num_scan_heads = num_channels // state_size
    order = order if order is not None else tuple(range(num_channels))
    aligned = 0
    for scan_head in range(num_scan_heads):
        kv_head, part = divmod(scan_head // geometry.group_size, num_slices)
        channels = order[scan_head * state_size : (scan_head + 1) * state_size]
        head = channels[0] // geometry.head_dim
        wanted = range(head * geometry.head_dim + part * state_size, head * geometry.head_dim + (part + 1) * state_size)
        aligned += head // geometry.group_size == kv_head and channels == tuple(wanted)
    return aligned, num_scan_heads

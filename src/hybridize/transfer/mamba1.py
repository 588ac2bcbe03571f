"""Mamba-in-Llama: attention's projections become a Mamba-1 mixer's (arXiv 2408.15237, 2511.02651).

Values go to x, keys to B, queries to C, the output projection to the output projection. The gate z, the step
size, the convolution, A and D have no counterpart in attention and keep the mixer's own initialisation.
"""

from hybridize.spec import AttentionGeometry, Mamba1Spec
from hybridize.transfer.attention import AttentionTensors
from hybridize.transfer.expressions import Expression, Fresh, Stack, Take
from hybridize.transfer.pairing import aligned_order, count_aligned


def fresh_expressions(spec: Mamba1Spec, initializer_range: float) -> dict[str, Expression]:
    """Every tensor of the mixer as its constructor makes it, by its name within the mixer."""
    normal = f"normal(0, {initializer_range:g})"
    bound = f"uniform(±{spec.conv_kernel}^-1/2), as torch initialises a convolution"
    how = {
        "in_proj.weight": normal,
        "dt_in_proj.weight": normal,
        "dt_proj.weight": f"uniform(±{spec.dt_rank}^-1/2)",
        "dt_proj.bias": (
            f"inverse softplus of step sizes log-uniform in [{spec.dt_min:g}, {spec.dt_max:g}], "
            f"at least {spec.dt_init_floor:g}"
        ),
        "conv1d.weight": bound,
        "conv1d.bias": bound,
        "A_log": f"log(1..{spec.state_size}) in every channel",
        "D": "1",
        "out_proj.weight": normal,
    }
    return {name: Fresh(name, words) for name, words in how.items()}


def carry_attention(
    spec: Mamba1Spec,
    attention: AttentionTensors,
    init: str,
    initializer_range: float,
    place: str,
) -> dict[str, Expression]:
    """The mixer's tensors with attention's weights carried over.

    Args:
        spec: resolved.
        attention: the teacher's tensors.
        init: `published` leaves queries and output as they lie; the others permute them so that each scan head pairs
            one slice (see `pairing`).
        initializer_range: standard deviation of the gate's rows.
        place: what to call the mixer in errors.

    Raises:
        ValueError: the mixer's sizes differ from attention's, or N does not divide the head width where
            aligned.
    """
    geometry = attention.geometry
    _check_width(place, "d_inner", spec.d_inner, geometry.num_heads * geometry.head_dim, "query heads x head width")
    _check_width(place, "d_xb", spec.d_xb, geometry.num_kv_heads * geometry.head_dim, "key/value heads x head width")
    assert spec.d_inner is not None
    assert spec.d_xb is not None
    order: tuple[int, ...] | None = None
    why = ""
    if init != "published":
        order = aligned_order(geometry, spec.state_size)
        num_slices = geometry.head_dim // spec.state_size
        why = f"in slices of {spec.state_size}, ordered by key/value head, slice and query head"
        if num_slices == 1:
            order = None  # one slice per head: they lie in that order already
    tensors = fresh_expressions(spec, initializer_range)
    gate = Fresh("in_proj.weight", f"normal(0, {initializer_range:g})", (0, spec.d_inner))
    tensors["in_proj.weight"] = Stack(
        (
            ("z", spec.d_inner, gate),
            ("x", spec.d_xb, attention.v),
            ("B", spec.d_xb, attention.k),
            ("C", spec.d_inner, attention.q.reorder(order, why)),
        )
    )
    tensors["out_proj.weight"] = Take(attention.o.source, order, 1, why)
    return tensors


def pairing_note(spec: Mamba1Spec, geometry: AttentionGeometry, init: str) -> str:
    """How many scan heads pair a query slice with the same slice of the teacher's own key/value head."""
    if geometry.head_dim % spec.state_size:
        return f"no scan head is aligned: {spec.state_size} states cut across heads of width {geometry.head_dim}"
    order = None if init == "published" else aligned_order(geometry, spec.state_size)
    count, total = count_aligned(geometry, spec.state_size, order)
    return f"{count} of {total} scan heads pair the same slice of query, key, value and output"


def _check_width(place: str, name: str, width: int | None, expected: int, meaning: str) -> None:
    if width != expected:
        raise ValueError(
            f"{place}.{name}: {width} differs from the teacher's {expected} ({meaning}), so attention's "
            f"weights do not fit; leave {name} open, or use init 'random'"
        )

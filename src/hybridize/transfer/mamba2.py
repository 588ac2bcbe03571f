"""Attention's projections become a Mamba-2 mixer's (arXiv 2405.21060), as Mamba-in-Llama does (arXiv 2408.15237).

Values go to x, keys to B, queries to C, the output projection to the output projection, and biases and norms where the
mixer has them. The gate z, the step size, the convolution, A, D and the norm of the output have no counterpart in
attention: they keep the mixer's own initialisation, unless the init is one that sets them (see `state_space`).

Where the mixer's heads are as wide as the teacher's, each is one of the teacher's. Where they are narrower, each has a
slice of a head's values, and either the same slice of its queries and keys, or all of both, which is exact.
"""

from hybridize.spec import AttentionGeometry, Mamba2Spec
from hybridize.transfer.attention import AttentionTensors
from hybridize.transfer.expressions import Constant, Expression, Fresh, Stack
from hybridize.transfer.neutral import MEMORIES, memory_lengths, step_bias
from hybridize.transfer.pairing import check_slices, count_aligned
from hybridize.transfer.state_space import (
    Slices,
    carry_extras,
    carry_rows,
    check_width,
    fresh_extras,
    gate_rows,
    neutral_extras,
    slice_heads,
)


def fresh_expressions(spec: Mamba2Spec, initializer_range: float) -> dict[str, Expression]:
    """Every tensor of the mixer as its constructor makes it, by its name within the mixer."""
    normal = f"normal(0, {initializer_range:g})"
    bound = f"uniform(±{spec.conv_kernel}^-1/2), as torch initialises a convolution"
    how = {
        "in_proj.weight": normal,
        "conv1d.weight": bound,
        "conv1d.bias": bound,
        "A_log": f"logarithms of decay rates uniform in [{spec.decay_min:g}, {spec.decay_max:g}]",
        "D": "1",
        "dt_bias": (
            f"inverse softplus of step sizes log-uniform in [{spec.dt_min:g}, {spec.dt_max:g}], "
            f"at least {spec.dt_init_floor:g}"
        ),
        "out_proj.weight": normal,
    }
    if spec.gate_norm:
        how["norm.weight"] = "1"
    return {name: Fresh(name, words) for name, words in how.items()} | fresh_extras(spec)


def carry_attention(
    spec: Mamba2Spec,
    attention: AttentionTensors,
    init: str,
    initializer_range: float,
    place: str,
) -> dict[str, Expression]:
    """The mixer's tensors with attention's weights carried over.

    Args:
        spec: resolved.
        attention: the teacher's tensors.
        init: `published` leaves all rows as they lie; the others pair each head with one query head, or a slice of one.
            `neutral` and `attention_gate` also set what attention lacks.
        initializer_range: standard deviation of the gate's and the step size's rows, where they are drawn.
        place: what to call the mixer in errors.

    Raises:
        ValueError: the mixer's sizes differ from attention's, or its norms.
    """
    geometry = attention.geometry
    num_heads, num_groups, width, num_states = _sizes(spec)
    inner_width = num_heads * width
    counts = {"num_heads": (num_heads, geometry.query_width), "num_groups": (num_groups, geometry.kv_width)}
    for name, (count, channels) in counts.items():
        check_width(place, name, count, channels // width, f"{channels} channels in heads of head_dim {width}")
    slices = Slices()
    if init == "published":
        check_width(place, "num_heads x state_size", num_heads * num_states, inner_width, "query heads x head width")
    else:
        check_slices(geometry, width, f"{place}.head_dim")
        if num_states not in (width, geometry.head_dim):
            raise ValueError(
                f"{place}.state_size: {num_states} is neither head_dim {width} nor the teacher's head width "
                f"{geometry.head_dim}, so no head can stand for a query head or a slice of one; use one of the two, "
                "or init 'random'"
            )
        slices = slice_heads(geometry, width, whole=num_states == geometry.head_dim)
    widths = (num_groups * width, num_groups * num_states, num_heads * num_states)
    first_step = inner_width + sum(widths)
    tensors = fresh_expressions(spec, initializer_range) | carry_extras(spec, attention, slices, widths, place)
    steps: Expression = Fresh(
        "in_proj.weight", f"normal(0, {initializer_range:g})", (first_step, first_step + num_heads)
    )
    if init in ("neutral", "attention_gate"):
        biases = tuple(step_bias(memory) for memory in memory_lengths(geometry, slices.heads))
        steps = Constant(0.0, (num_heads, geometry.hidden_size), "0, step sizes the same for every token")
        tensors |= neutral_extras(spec, sum(widths), inner_width)
        tensors |= {
            "dt_bias": Constant(biases, (num_heads,), MEMORIES),
            "A_log": Constant(0.0, (num_heads,), "0, decay rate 1"),
            "D": Constant(0.0, (num_heads,), "0"),
        }
    gate = gate_rows(spec, attention, slices, init, inner_width, initializer_range)
    rows = carry_rows(attention, slices)
    tensors["in_proj.weight"] = Stack(
        (
            ("z", inner_width, gate),
            *((label, width, take) for width, (label, take) in zip(widths, rows, strict=True)),
            ("dt", num_heads, steps),
        )
    )
    return tensors


def pairing_note(spec: Mamba2Spec, geometry: AttentionGeometry, init: str) -> str:
    """How many heads pair the same slice of query, key, value and output, of the teacher's own key/value head."""
    num_heads, _, width, num_states = _sizes(spec)
    count, slice_words = num_heads, "a slice of value and output with all of their query and key"
    if num_states == width:
        slice_words = "the same slice of query, key, value and output"
        if geometry.head_dim % width:
            return f"no head is aligned: heads of width {width} cut across heads of width {geometry.head_dim}"
        if init == "published":
            count, _ = count_aligned(geometry, width, None)
    return f"{count} of {num_heads} heads pair {slice_words}"


def _sizes(spec: Mamba2Spec) -> tuple[int, int, int, int]:
    """H, G, P and N of a resolved spec."""
    assert spec.num_heads is not None
    assert spec.num_groups is not None
    assert spec.head_dim is not None
    assert spec.state_size is not None
    return spec.num_heads, spec.num_groups, spec.head_dim, spec.state_size

"""Mamba-in-Llama: attention's projections become a Mamba-1 mixer's (arXiv 2408.15237, 2511.02651).

Values go to x, keys to B, queries to C, the output projection to the output projection, and biases and norms where the
mixer has them. The gate z, the step size, the convolution, A and D have no counterpart in attention: they keep the
mixer's own initialisation, unless the init is one that sets them (see `state_space`).
"""

from hybridize.spec import AttentionGeometry, Mamba1Spec
from hybridize.transfer.attention import AttentionTensors
from hybridize.transfer.expressions import Constant, Expression, Fresh, Stack
from hybridize.transfer.neutral import MEMORIES, memory_lengths, step_bias
from hybridize.transfer.pairing import aligned_order, check_slices, count_aligned
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
    return {name: Fresh(name, words) for name, words in how.items()} | fresh_extras(spec)


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
            one slice (see `pairing`). `neutral` and `attention_gate` also set what attention lacks.
        initializer_range: standard deviation of the gate's rows, where they are drawn.
        place: what to call the mixer in errors.

    Raises:
        ValueError: the mixer's sizes differ from attention's, or N does not divide the head width where
            aligned; or its norms do not fit.
    """
    geometry = attention.geometry
    check_width(place, "d_inner", spec.d_inner, geometry.query_width, "query heads x head width")
    check_width(place, "d_xb", spec.d_xb, geometry.kv_width, "key/value heads x head width")
    assert spec.d_inner is not None
    assert spec.d_xb is not None
    assert spec.dt_rank is not None
    num_states = spec.state_size
    slices = Slices()
    if init != "published":
        check_slices(geometry, num_states, f"{place}.state_size")
        slices = slice_heads(geometry, num_states)
    widths = (spec.d_xb, spec.d_xb, spec.d_inner)
    tensors = fresh_expressions(spec, initializer_range) | carry_extras(spec, attention, slices, widths, place)
    gate = gate_rows(spec, attention, slices, init, spec.d_inner, initializer_range)
    rows = carry_rows(attention, slices)
    tensors["in_proj.weight"] = Stack(
        (
            ("z", spec.d_inner, gate),
            *((label, width, take) for width, (label, take) in zip(widths, rows, strict=True)),
        )
    )
    if init in ("neutral", "attention_gate"):
        times = 2 if spec.dt_bias_mode == "double" else 1
        biases = [step_bias(memory) / times for memory in memory_lengths(geometry, slices.heads)]
        of_channels = tuple(bias for bias in biases for _ in range(num_states))
        halved = ", halved since it is added twice" if times == 2 else ""
        tensors |= neutral_extras(spec, spec.d_inner, spec.d_inner)
        tensors |= {
            "dt_proj.weight": Constant(0.0, (spec.d_inner, spec.dt_rank), "0, step sizes the same for every token"),
            "dt_proj.bias": Constant(of_channels, (spec.d_inner,), MEMORIES + halved),
            "A_log": Constant(0.0, (spec.d_inner, num_states), "0, decay rate 1 for every state"),
            "D": Constant(0.0, (spec.d_inner,), "0"),
        }
    return tensors


def pairing_note(spec: Mamba1Spec, geometry: AttentionGeometry, init: str) -> str:
    """How many scan heads pair a query slice with the same slice of the teacher's own key/value head."""
    if geometry.head_dim % spec.state_size:
        return f"no scan head is aligned: {spec.state_size} states cut across heads of width {geometry.head_dim}"
    order = None if init == "published" else aligned_order(geometry, spec.state_size)
    count, total = count_aligned(geometry, spec.state_size, order)
    return f"{count} of {total} scan heads pair the same slice of query, key, value and output"

"""What a state space takes over from attention, whichever Mamba it is: values as x, keys as B, queries as C.

A scan's heads stand for query heads, or for slices of them, each with the key/value head that the teacher pairs it
with (see `pairing`). `neutral` and `attention_gate` also set what attention lacks (see `neutral`): the skip connection
is closed, the step size is 1 / memory at decay rate 1, and the gate is open where it has a bias.
"""

from dataclasses import dataclass

from hybridize.spec import AttentionGeometry, Mamba1Spec, Mamba2Spec
from hybridize.transfer.attention import AttentionTensors, check_norm
from hybridize.transfer.expressions import Blend, Constant, Expression, Fresh, Stack, Take
from hybridize.transfer.neutral import newest_tap, open_silu, reorder_norm
from hybridize.transfer.pairing import aligned_order


@dataclass(frozen=True)
class Slices:
    """Which of attention's channels those of a scan stand for; by default they stay as they lie.

    Attributes:
        B: rows of the keys.
        C: rows of the queries.
        out: columns of the output projection.
        values: rows of the values that each channel of a head reads, by head.
        heads: the query head that each scan head stands for.
        why: the order in words.
    """

    B: tuple[int, ...] | None = None
    C: tuple[int, ...] | None = None
    out: tuple[int, ...] | None = None
    values: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    why: str = ""


def slice_heads(geometry: AttentionGeometry, width: int, whole: bool = False) -> Slices:
    """Pair a scan's heads with slices of the teacher's query heads.

    Args:
        geometry: of the teacher's attention.
        width: channels of a scan head; divides the head width.
        whole: whether a scan head has all of its query head's queries and keys, not only the slice of its values.
    """
    head_dim, group_size = geometry.head_dim, geometry.group_size
    out = aligned_order(geometry, width)
    heads = tuple(channel // head_dim for channel in out[::width])
    values = tuple(channel // head_dim // group_size * head_dim + channel % head_dim for channel in out)
    if width == head_dim:
        return Slices(values=values, heads=heads)  # one slice per head: they lie in that order already
    why = f"in slices of {width}, ordered by key/value head, slice and query head"
    if not whole:
        return Slices(None, out, out, values, heads, why)
    queries = tuple(head * head_dim + channel for head in heads for channel in range(head_dim))
    keys = tuple(head // group_size * head_dim + channel for head in heads[::group_size] for channel in range(head_dim))
    return Slices(keys, queries, out, values, heads, why)


def fresh_extras(spec: Mamba1Spec | Mamba2Spec) -> dict[str, Expression]:
    """The tensors that a mixer has only if the spec says so, as its constructor makes them."""
    how: dict[str, str] = {}
    if spec.qkv_bias:
        how["qkv_bias"] = "0"
    if spec.gate_bias:
        how["gate_bias"] = "0"
    if spec.qk_norm != "none":
        how |= {"q_norm.weight": "1", "k_norm.weight": "1"}
    if spec.output_bias:
        how["out_proj.bias"] = "0"
    return {name: Fresh(name, words) for name, words in how.items()}


def carry_rows(attention: AttentionTensors, slices: Slices) -> tuple[tuple[str, Take], ...]:
    """The input projection's rows x | B | C, each with its label."""
    return (
        ("x", attention.v),
        ("B", attention.k.reorder(slices.B, slices.why)),
        ("C", attention.q.reorder(slices.C, slices.why)),
    )


def carry_extras(
    spec: Mamba1Spec | Mamba2Spec, attention: AttentionTensors, slices: Slices, widths: tuple[int, int, int], place: str
) -> dict[str, Expression]:
    """Output projection, biases and norms as attention has them.

    Args:
        spec: resolved.
        attention: the teacher's tensors.
        slices: what the scan's channels stand for.
        widths: of x, B and C.
        place: what to call the mixer in errors.

    Raises:
        ValueError: the mixer is to have a norm that the teacher's does not fit.
    """
    made = fresh_extras(spec)
    if spec.qkv_bias and attention.q_bias and attention.k_bias and attention.v_bias:
        takes = (
            attention.v_bias,
            attention.k_bias.reorder(slices.B, slices.why),
            attention.q_bias.reorder(slices.C, slices.why),
        )
        made["qkv_bias"] = Stack(tuple(zip("xBC", widths, takes, strict=True)))
    if spec.output_bias and attention.o_bias:
        made["out_proj.bias"] = attention.o_bias
    if spec.qk_norm != "none" and attention.q_norm is not None and attention.k_norm is not None:
        assert spec.state_size is not None
        check_norm(spec, spec.state_size, "state_size", attention.geometry, place)
        orders = (slices.C, slices.B) if spec.qk_norm == "width" else (None, None)
        made["q_norm.weight"] = reorder_norm(attention.q_norm, orders[0], slices.why)
        made["k_norm.weight"] = reorder_norm(attention.k_norm, orders[1], slices.why)
    made["out_proj.weight"] = Take(attention.o.source, slices.out, 1, slices.why)
    return made


def neutral_extras(spec: Mamba1Spec | Mamba2Spec, conv_width: int, inner_width: int) -> dict[str, Expression]:
    """The convolution and the gate's bias of the neutral inits."""
    made: dict[str, Expression] = {
        "conv1d.weight": newest_tap(conv_width, spec.conv_kernel),
        "conv1d.bias": Constant(0.0, (conv_width,), "0"),
    }
    if spec.gate_bias:
        made["gate_bias"] = open_silu(inner_width)
    return made


def gate_rows(
    spec: Mamba1Spec | Mamba2Spec,
    attention: AttentionTensors,
    slices: Slices,
    init: str,
    inner_width: int,
    initializer_range: float,
) -> Expression:
    """The output gate's rows of the input projection, [heads · width, E].

    `neutral` sets them to 0 where a bias keeps the gate open, since without one a gate of zero weights is shut.
    """
    if init == "attention_gate":
        outputs = Take(attention.o.source, slices.out, 1, slices.why, transposed=True)
        values = attention.v.reorder(slices.values, "repeated for the heads that read them")
        return Blend(((0.5, outputs), (0.5, values)))
    if init == "neutral" and spec.gate_bias:
        return Constant(0.0, (inner_width, attention.geometry.hidden_size), "0, a gate that its bias alone decides")
    return Fresh("in_proj.weight", f"normal(0, {initializer_range:g})", (0, inner_width))


def check_width(place: str, name: str, width: int | None, expected: int, meaning: str) -> None:
    """Raise a `ValueError` if a size of the mixer differs from attention's."""
    if width != expected:
        raise ValueError(
            f"{place}.{name}: {width} differs from the teacher's {expected} ({meaning}), so attention's "
            f"weights do not fit; leave {name} open, or use init 'random'"
        )

"""What the transfers to gated delta net and to Kimi delta attention share.

Queries, keys and values go to queries, keys and values, the output projection to the output projection. Gates, decays,
β and the convolution have no counterpart in attention.
"""

import math
from dataclasses import dataclass

from hybridize.spec import AttentionGeometry, GatedDeltaNetSpec, KimiDeltaAttentionSpec
from hybridize.transfer.attention import AttentionTensors, check_norm
from hybridize.transfer.expressions import Constant, Expression, Fresh, Take
from hybridize.transfer.neutral import MEMORIES, memory_lengths, newest_tap, open_silu, reorder_norm, step_bias
from hybridize.transfer.pairing import aligned_order, check_slices, count_aligned

AnySpec = GatedDeltaNetSpec | KimiDeltaAttentionSpec


@dataclass(frozen=True)
class Order:
    """In which order a mixer has the teacher's query channels; None for as they lie.

    Attributes:
        channels: for each of the mixer's channels, the teacher's.
        why: the order in words.
    """

    channels: tuple[int, ...] | None
    why: str = ""


def query_order(spec: AnySpec, geometry: AttentionGeometry, init: str) -> Order:
    """The order of queries and of the output projection's columns.

    A mixer's head reads the group that it lies in. By `published` the teacher's query head h is to read key/value head
    h mod kv_heads, as public code has it, so it goes to a head of that group; by the other inits its own.
    """
    if init == "published":
        spread = range(geometry.num_kv_heads), range(geometry.group_size)
        heads = [member * geometry.num_kv_heads + kv_head for kv_head in spread[0] for member in spread[1]]
        if heads == sorted(heads):
            return Order(None)
        width = geometry.head_dim
        channels = tuple(channel for head in heads for channel in range(head * width, (head + 1) * width))
        return Order(channels, f"heads ordered by their number mod {geometry.num_kv_heads}")
    assert spec.head_dim is not None
    if spec.head_dim == geometry.head_dim:
        return Order(None)
    why = f"in slices of {spec.head_dim}, ordered by key/value head, slice and query head"
    return Order(aligned_order(geometry, spec.head_dim), why)


def describe(spec: AnySpec, initializer_range: float, projections: tuple[str, ...]) -> dict[str, Expression]:
    """Every tensor of the mixer as its constructor makes it.

    Args:
        spec: resolved.
        initializer_range: standard deviation of the projections' weights.
        projections: names of those that only this kind of mixer has.
    """
    normal = f"normal(0, {initializer_range:g})"
    shared = ("q_proj", "k_proj", "v_proj", "o_proj", "b_proj")
    how = {f"{name}.weight": normal for name in (*shared, *projections)}
    if spec.qkv_bias:
        how |= dict.fromkeys(("q_proj.bias", "k_proj.bias", "v_proj.bias"), "0")
    if spec.output_bias:
        how["o_proj.bias"] = "0"
    if spec.qk_norm != "none":
        how |= dict.fromkeys(("q_norm.weight", "k_norm.weight"), "1")
    if spec.output_norm:
        how["o_norm.weight"] = "1"
    if spec.gate_bias:
        how["gate_bias"] = "0"
    how["conv1d.weight"] = f"uniform(±{spec.conv_kernel}^-1/2), as torch initialises a convolution"
    how["A_log"] = f"log of decay rates uniform in [{spec.decay_min:g}, {spec.decay_max:g}]"
    how["dt_bias"] = (
        f"inverse softplus of step sizes log-uniform in [{spec.dt_min:g}, {spec.dt_max:g}], "
        f"at least {spec.dt_init_floor:g}"
    )
    return {name: Fresh(name, words) for name, words in how.items()}


def carry(spec: AnySpec, attention: AttentionTensors, order: Order, place: str) -> dict[str, Expression]:
    """Attention's own tensors, for the mixer's of the same names.

    Args:
        spec: resolved.
        attention: the teacher's tensors.
        order: of the queries.
        place: what to call the mixer in errors.

    Raises:
        ValueError: the teacher's norms of queries and keys do not fit.
    """
    carried: dict[str, Expression] = {
        "q_proj.weight": attention.q.reorder(order.channels, order.why),
        "k_proj.weight": attention.k,
        "v_proj.weight": attention.v,
        "o_proj.weight": Take(attention.o.source, order.channels, 1, order.why),
    }
    biases = {"q_proj": attention.q_bias, "k_proj": attention.k_bias, "v_proj": attention.v_bias}
    for name, bias in biases.items():
        if spec.qkv_bias and bias is not None:
            carried[f"{name}.bias"] = bias.reorder(order.channels, order.why) if name == "q_proj" else bias
    if spec.output_bias and attention.o_bias is not None:
        carried["o_proj.bias"] = attention.o_bias
    if spec.qk_norm != "none" and attention.q_norm is not None and attention.k_norm is not None:
        assert spec.head_dim is not None
        check_norm(spec, spec.head_dim, "head_dim", attention.geometry, place)
        channels = order.channels if spec.qk_norm == "width" else None
        carried["q_norm.weight"] = reorder_norm(attention.q_norm, channels, order.why)
        carried["k_norm.weight"] = attention.k_norm
    return carried


def check_sizes(spec: AnySpec, geometry: AttentionGeometry, init: str, place: str) -> None:
    """Check that attention's weights fit.

    Raises:
        ValueError: they do not; names the size and the remedy.
    """
    assert spec.head_dim is not None
    if init == "published" and spec.head_dim != geometry.head_dim:
        raise ValueError(
            f"{place}.head_dim: {spec.head_dim} differs from the teacher's {geometry.head_dim}, which init "
            "'published' knows no way around; leave head_dim open, or use init 'aligned'"
        )
    check_slices(geometry, spec.head_dim, f"{place}.head_dim", "init 'random'")
    widths = {
        "num_heads": (spec.num_heads, geometry.query_width),
        "num_groups": (spec.num_groups, geometry.kv_width),
    }
    for name, (count, width) in widths.items():
        if count != width // spec.head_dim:
            raise ValueError(
                f"{place}.{name}: {count} x head_dim {spec.head_dim} differs from the teacher's {width} channels, "
                f"so attention's weights do not fit; leave {name} open, or use init 'random'"
            )


def neutral_convolution(spec: AnySpec, tap: float = 1.0) -> Constant:
    """A convolution that reads the token itself only, times `tap`."""
    assert spec.num_heads is not None
    assert spec.num_groups is not None
    assert spec.head_dim is not None
    channels = (spec.num_heads + 2 * spec.num_groups) * spec.head_dim
    return newest_tap(channels, spec.conv_kernel, tap)


def constant_beta(spec: AnySpec, hidden_size: int) -> Constant:
    """The projection of β that gives 1/2 for every token."""
    assert spec.num_heads is not None
    return Constant(0.0, (spec.num_heads, hidden_size), "0, so that β is 1/2 for every token")


def slow_decays(
    spec: AnySpec, geometry: AttentionGeometry, order: Order, channels_per_head: int
) -> dict[str, Expression]:
    """A_log and dt_bias for decays that are the same for every token, with another memory for each query head.

    Slices of one query head have the same memory.

    Args:
        spec: resolved.
        geometry: of the teacher's attention.
        order: of the queries.
        channels_per_head: how many decays a head has.
    """
    assert spec.num_heads is not None
    assert spec.head_dim is not None
    firsts = range(0, spec.num_heads * spec.head_dim, spec.head_dim)
    channels = [first if order.channels is None else order.channels[first] for first in firsts]
    memories = memory_lengths(geometry, [channel // geometry.head_dim for channel in channels])
    biases = tuple(step_bias(memory) for memory in memories for _ in range(channels_per_head))
    return {
        "A_log": Constant(0.0, (spec.num_heads,), "0, a decay rate of 1 per unit of step size"),
        "dt_bias": Constant(biases, (len(biases),), MEMORIES),
    }


def constant_gate(spec: AnySpec, weight: str, shape: tuple[int, int]) -> dict[str, Expression]:
    """An output gate that is the same for every token, where its form allows.

    SiLU is 1 at a bias of 1.278; without a bias it cannot be held open, and the gate stays as the constructor makes
    it. A sigmoid is held at 1/2, where it learns best. (To double the output projection makes up for that and was far
    worse after training: docs/LOG.md.)

    Args:
        spec: resolved.
        weight: name of the (last) projection of the gate.
        shape: its shape.
    """
    if spec.gate == "sigmoid":
        made: dict[str, Expression] = {weight: Constant(0.0, shape, "0, a gate of 1/2 for every token")}
        return made | ({"gate_bias": Constant(0.0, (shape[0],), "0")} if spec.gate_bias else {})
    if spec.gate == "silu" and spec.gate_bias:
        return {
            weight: Constant(0.0, shape, "0, a gate that is the same for every token"),
            "gate_bias": open_silu(shape[0]),
        }
    return {}


def slow_published_decays(spec: AnySpec, num_decays: int) -> dict[str, Expression]:
    """A_log and dt_bias of public code: each token keeps 93%."""
    assert spec.num_heads is not None
    return {
        "A_log": Constant(math.log(0.1), (spec.num_heads,), "log(0.1)"),
        "dt_bias": Constant(0.0, (num_decays,), "0"),
    }


def pairing_note(spec: AnySpec, geometry: AttentionGeometry, init: str) -> str:
    """How many of the mixer's heads pair a query slice with the same slice of the teacher's own key/value head."""
    assert spec.head_dim is not None
    count, total = count_aligned(geometry, spec.head_dim, query_order(spec, geometry, init).channels)
    return f"{count} of {total} heads pair the same slice of query, key, value and output"

"""Attention's projections become a gated delta net's (arXiv 2412.06464; by public code called DIL).

Inits: see `hybridize.transfer.plan.plan_transfer`. `published` follows the public code of Apriel-H1's successor
(arXiv 2604.19877): query head h reads key/value head h mod kv_heads, the convolution's newest tap is 1/2, decays keep
93% of the state per token, β is 1/2, and the gate's weights are 0, which shuts a SiLU.
"""

from hybridize.spec import AttentionGeometry, GatedDeltaNetSpec
from hybridize.transfer import delta_rule
from hybridize.transfer.attention import AttentionTensors
from hybridize.transfer.expressions import Blend, Constant, Expression, Take


def fresh_expressions(spec: GatedDeltaNetSpec, initializer_range: float) -> dict[str, Expression]:
    """Every tensor of the mixer as its constructor makes it, by its name within the mixer."""
    gates = () if spec.gate == "none" else ("g_proj",)
    return delta_rule.describe(spec, initializer_range, ("a_proj", *gates))


def carry_attention(
    spec: GatedDeltaNetSpec, attention: AttentionTensors, init: str, initializer_range: float, place: str
) -> dict[str, Expression]:
    """The mixer's tensors with attention's weights carried over.

    Args:
        spec: resolved.
        attention: the teacher's tensors.
        init: any but `random`.
        initializer_range: standard deviation of what is drawn.
        place: what to call the mixer in errors.

    Raises:
        ValueError: the mixer's sizes differ from attention's, or there is no gate to make of attention.
    """
    geometry = attention.geometry
    delta_rule.check_sizes(spec, geometry, init, place)
    order = delta_rule.query_order(spec, geometry, init)
    carried = fresh_expressions(spec, initializer_range) | delta_rule.carry(spec, attention, order, place)
    if init == "aligned":
        return carried
    assert spec.num_heads is not None
    hidden_size = geometry.hidden_size
    gate_shape = (geometry.query_width, hidden_size)
    no_decay = Constant(0.0, (spec.num_heads, hidden_size), "0, a decay that is the same for every token")
    carried |= {"a_proj.weight": no_decay, "b_proj.weight": delta_rule.constant_beta(spec, hidden_size)}
    if init == "published":
        carried |= {"conv1d.weight": delta_rule.neutral_convolution(spec, 0.5)}
        carried |= delta_rule.slow_published_decays(spec, spec.num_heads)
        if spec.gate != "none":
            carried["g_proj.weight"] = Constant(0.0, gate_shape, "0")
        return carried
    carried |= {"conv1d.weight": delta_rule.neutral_convolution(spec)}
    carried |= delta_rule.slow_decays(spec, geometry, order, channels_per_head=1)
    carried |= delta_rule.constant_gate(spec, "g_proj.weight", gate_shape)
    if init == "attention_gate":
        carried["g_proj.weight"] = _gate_of_attention(spec, attention, order, place)
    return carried


def pairing_note(spec: GatedDeltaNetSpec, geometry: AttentionGeometry, init: str) -> str:
    """How many of the mixer's heads pair a query slice with the same slice of the teacher's own key/value head."""
    return delta_rule.pairing_note(spec, geometry, init)


def _gate_of_attention(
    spec: GatedDeltaNetSpec, attention: AttentionTensors, order: delta_rule.Order, place: str
) -> Blend:
    """Half the output projection, transposed, plus half the values, repeated for the heads that read them."""
    if spec.gate == "none":
        raise ValueError(
            f"{place}.gate: 'none' leaves init 'attention_gate' nothing to make; set a gate, or use init 'neutral'"
        )
    assert spec.num_heads is not None
    assert spec.num_groups is not None
    assert spec.head_dim is not None
    width, heads_per_group = spec.head_dim, spec.num_heads // spec.num_groups
    repeated = tuple(
        head // heads_per_group * width + channel for head in range(spec.num_heads) for channel in range(width)
    )
    output = Take(attention.o.source, order.channels, 1, order.why, transposed=True)
    values = attention.v.reorder(repeated, f"each head of {width} repeated {heads_per_group} times")
    return Blend(((0.5, output), (0.5, values)))

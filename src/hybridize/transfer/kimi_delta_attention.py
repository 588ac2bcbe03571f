"""Attention's projections become Kimi delta attention's (arXiv 2510.26692; by public code called KIL).

Inits: see `hybridize.transfer.plan.plan_transfer`. `published` follows the public code of Apriel-H1's successor
(arXiv 2604.19877): query head h reads key/value head h mod kv_heads, the convolution's newest tap is 1/2, decays keep
about 93% of the state per token, and the projections of decays, β and gate are drawn. `attention_gate` has no meaning
here: the gate's projection is of low rank.
"""

from hybridize.spec import AttentionGeometry, KimiDeltaAttentionSpec
from hybridize.transfer import delta_rule
from hybridize.transfer.attention import AttentionTensors
from hybridize.transfer.expressions import Constant, Expression


def fresh_expressions(spec: KimiDeltaAttentionSpec, initializer_range: float) -> dict[str, Expression]:
    """Every tensor of the mixer as its constructor makes it, by its name within the mixer."""
    gates = () if spec.gate == "none" else ("g_a_proj", "g_b_proj")
    return delta_rule.describe(spec, initializer_range, ("f_a_proj", "f_b_proj", *gates))


def carry_attention(
    spec: KimiDeltaAttentionSpec, attention: AttentionTensors, init: str, initializer_range: float, place: str
) -> dict[str, Expression]:
    """The mixer's tensors with attention's weights carried over.

    Args:
        spec: resolved.
        attention: the teacher's tensors.
        init: any but `random`.
        initializer_range: standard deviation of what is drawn.
        place: what to call the mixer in errors.

    Raises:
        ValueError: the mixer's sizes differ from attention's, or the init is `attention_gate`.
    """
    if init == "attention_gate":
        raise ValueError(
            f"{place}: the output gate of a {spec.type} mixer is a projection of low rank, so init 'attention_gate' "
            "cannot fill it; use init 'neutral', or a gated_delta_net"
        )
    geometry = attention.geometry
    delta_rule.check_sizes(spec, geometry, init, place)
    order = delta_rule.query_order(spec, geometry, init)
    carried = fresh_expressions(spec, initializer_range) | delta_rule.carry(spec, attention, order, place)
    if init == "aligned":
        return carried
    assert spec.head_dim is not None
    assert spec.gate_rank is not None
    if init == "published":
        decays = delta_rule.slow_published_decays(spec, geometry.query_width)
        return carried | decays | {"conv1d.weight": delta_rule.neutral_convolution(spec, 0.5)}
    shape = (geometry.query_width, spec.gate_rank)
    return (
        carried
        | {
            "f_b_proj.weight": Constant(0.0, shape, "0, a decay that is the same for every token"),
            "b_proj.weight": delta_rule.constant_beta(spec, geometry.hidden_size),
            "conv1d.weight": delta_rule.neutral_convolution(spec),
        }
        | delta_rule.slow_decays(spec, geometry, order, channels_per_head=spec.head_dim)
        | delta_rule.constant_gate(spec, "g_b_proj.weight", shape)
    )


def pairing_note(spec: KimiDeltaAttentionSpec, geometry: AttentionGeometry, init: str) -> str:
    """How many of the mixer's heads pair a query slice with the same slice of the teacher's own key/value head."""
    return delta_rule.pairing_note(spec, geometry, init)

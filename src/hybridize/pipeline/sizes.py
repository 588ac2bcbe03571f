"""How many parameters a teacher and its mixers have, and how large states are, from configs; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybridize.spec.mixers import (
    AttentionGeometry,
    AttentionSpec,
    CarriesAttention,
    DeltaRuleSpec,
    IdentitySpec,
    KimiDeltaAttentionSpec,
    Mamba1Spec,
    Mamba2Spec,
    MixerSpec,
    SlidingWindowSpec,
)


@dataclass(frozen=True)
class TeacherShape:
    """Sizes of a dense decoder, for counting parameters and operations.

    Attributes:
        geometry: of its attention.
        num_layers: decoder layers.
        intermediate_size: width of the gated MLP.
        vocab_size: rows of the embedding.
        tied: whether input and output embedding are one.
    """

    geometry: AttentionGeometry
    num_layers: int
    intermediate_size: int
    vocab_size: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TeacherShape":
        """Read a config.json."""
        heads = config["num_attention_heads"]
        return cls(
            AttentionGeometry(
                hidden_size=config["hidden_size"],
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ),
            config["num_hidden_layers"],
            config["intermediate_size"],
            config["vocab_size"],
            config.get("tie_word_embeddings", False),
        )

    @property
    def attention_parameters(self) -> int:
        """Of the q, k, v and o projections of one layer."""
        g = self.geometry
        return 2 * g.hidden_size * g.head_dim * (g.num_heads + g.num_kv_heads)

    @property
    def layer_parameters(self) -> int:
        """Of one layer: attention, gated MLP, two norms."""
        hidden = self.geometry.hidden_size
        return self.attention_parameters + 3 * hidden * self.intermediate_size + 2 * hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.geometry.hidden_size
        return self.num_layers * self.layer_parameters + embeddings + self.geometry.hidden_size

    @property
    def active_parameters(self) -> int:
        """What a token is multiplied with: all but the input embedding."""
        head = self.vocab_size * self.geometry.hidden_size
        return self.num_layers * self.layer_parameters + head


def mixer_parameters(spec: MixerSpec, shape: TeacherShape) -> int:
    """Parameters of one mixer in the place of the teacher's attention."""
    geometry = shape.geometry
    spec = spec.resolve(geometry)
    match spec:
        case AttentionSpec():
            return shape.attention_parameters
        case SlidingWindowSpec():
            return shape.attention_parameters + spec.sink * geometry.num_heads
        case IdentitySpec():
            return 0
        case Mamba1Spec():
            return _mamba1(spec, geometry.hidden_size)
        case Mamba2Spec():
            return _mamba2(spec, geometry.hidden_size)
        case DeltaRuleSpec():
            return _delta_rule(spec, geometry.hidden_size)
    raise AssertionError(f"no count for {type(spec).__name__}")


def state_numbers(spec: MixerSpec, geometry: AttentionGeometry) -> tuple[int, int]:
    """Numbers in a mixer's state per sequence: of the recurrence, and of the convolution's last inputs.

    Between steps a convolution of k taps needs k - 1 inputs. Attention has no such state, nor has `identity`.
    """
    spec = spec.resolve(geometry)
    match spec:
        case Mamba1Spec():
            assert spec.d_inner
            recurrence, channels = spec.d_inner * spec.state_size, spec.d_inner
        case Mamba2Spec():
            assert spec.num_heads
            assert spec.num_groups
            assert spec.head_dim
            assert spec.state_size
            recurrence = spec.num_heads * spec.head_dim * spec.state_size
            channels = spec.num_groups * (spec.head_dim + spec.state_size) + spec.num_heads * spec.state_size
        case DeltaRuleSpec():
            assert spec.num_heads
            assert spec.num_groups
            assert spec.head_dim
            recurrence = spec.num_heads * spec.head_dim**2
            channels = (spec.num_heads + 2 * spec.num_groups) * spec.head_dim
        case _:
            return 0, 0
    return recurrence, channels * (spec.conv_kernel - 1)


def _mamba1(spec: Mamba1Spec, hidden: int) -> int:
    assert spec.d_inner
    assert spec.d_xb
    assert spec.dt_rank
    projections = hidden * (3 * spec.d_inner + 2 * spec.d_xb + spec.dt_rank) + spec.dt_rank * spec.d_inner
    scan = spec.d_inner * (spec.conv_kernel + spec.state_size + 3)
    return projections + scan + _carried(spec, spec.d_inner, spec.d_xb, spec.d_inner, spec.state_size, hidden)


def _mamba2(spec: Mamba2Spec, hidden: int) -> int:
    assert spec.num_heads
    assert spec.num_groups
    assert spec.head_dim
    assert spec.state_size
    inner, x = spec.num_heads * spec.head_dim, spec.num_groups * spec.head_dim
    b, c = spec.num_groups * spec.state_size, spec.num_heads * spec.state_size
    projections = hidden * (2 * inner + x + b + c + spec.num_heads)
    scan = (x + b + c) * (spec.conv_kernel + 1) + 3 * spec.num_heads + spec.gate_norm * inner
    return projections + scan + _carried(spec, c, b, inner, spec.state_size, hidden, x)


def _delta_rule(spec: DeltaRuleSpec, hidden: int) -> int:
    assert spec.num_heads
    assert spec.num_groups
    assert spec.head_dim
    query, kv = spec.num_heads * spec.head_dim, spec.num_groups * spec.head_dim
    projections = hidden * (2 * query + 2 * kv + spec.num_heads)
    if isinstance(spec, KimiDeltaAttentionSpec):
        assert spec.gate_rank
        decays = spec.gate_rank * (hidden + query) + query + spec.num_heads
        gate = spec.gate_rank * (hidden + query)
    else:
        decays = spec.num_heads * (hidden + 2)
        gate = hidden * query
    gate *= spec.gate != "none"
    norm = spec.output_norm * spec.head_dim
    scan = (query + 2 * kv) * spec.conv_kernel + decays + gate + norm
    return projections + scan + _carried(spec, query, kv, query, spec.head_dim, hidden)


def _carried(
    spec: CarriesAttention, query: int, key: int, gate: int, head: int, hidden: int, value: int | None = None
) -> int:
    """Biases and norms: of queries, keys, values, output and gate."""
    value = key if value is None else value
    norms = {"none": 0, "head": 2 * head, "width": query + key}[spec.qk_norm or "none"]
    biases = bool(spec.qkv_bias) * (query + key + value) + bool(spec.output_bias) * hidden
    return norms + biases + spec.gate_bias * gate

"""Linear attention with the delta rule: gated delta net and Kimi delta attention."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from hybridize.spec.mixers.base import AttentionGeometry, CarriesAttention, check_multiples, check_steps


class DeltaRuleSpec(CarriesAttention):
    """What the two mixers with a delta rule share: heads with a state of `head_width` x `head_width`.

    Queries come in heads, keys and values in groups of heads, as the teacher's do.

    Attributes:
        head_width: K and V, width of a head's keys and values; default: the teacher's head_dim.
        num_heads: H; default: so many that all of the teacher's query channels have their place.
        num_groups: G, groups of heads that share keys and values; default: likewise for its keys and values.
        conv_kernel: taps of the causal depthwise convolution on queries, keys and values.
        conv_activation: what follows the convolution.
        l2_norm: scale queries and keys to length 1 behind the convolution. Without it the delta rule is only stable
            where keys are short.
        decay_min: smallest initial decay rate, per unit of step size.
        decay_max: largest initial decay rate.
        dt_min: smallest initial step size, in tokens.
        dt_max: largest initial step size, in tokens.
        dt_init_floor: initial step sizes are clamped to at least this.
    """

    head_width: int | None = Field(default=None, gt=0)
    num_heads: int | None = Field(default=None, gt=0)
    num_groups: int | None = Field(default=None, gt=0)
    conv_kernel: int = Field(default=4, ge=2)
    conv_activation: Literal["silu", "none"] = "silu"
    l2_norm: bool = True
    decay_min: float = Field(default=1.0, gt=0)
    decay_max: float = Field(default=16.0, gt=0)
    dt_min: float = Field(default=1e-3, gt=0)
    dt_max: float = Field(default=1e-1, gt=0)
    dt_init_floor: float = Field(default=1e-4, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_steps(self.dt_min, self.dt_max)
        if self.decay_min > self.decay_max:
            raise ValueError(f"decay_min {self.decay_min} exceeds decay_max {self.decay_max}; swap them")
        check_multiples({"num_heads": self.num_heads}, "num_groups", self.num_groups)
        return self

    def _sizes(self, geometry: AttentionGeometry) -> dict[str, object]:
        width = self.head_width or geometry.head_dim
        if self.num_heads is None or self.num_groups is None:
            widths = {"the query width": geometry.query_width, "the key/value width": geometry.kv_width}
            check_multiples(widths, "head_width", width)
        return {
            "head_width": width,
            "num_heads": geometry.query_width // width,
            "num_groups": geometry.kv_width // width,
            **self._attention_sizes(geometry),
        }

    def resolve(self, geometry: AttentionGeometry) -> Self:
        """Return the spec with every size filled in from the teacher's attention.

        Raises:
            ValueError: the sizes do not divide one another.
        """
        return self._filled(self._sizes(geometry))


class GatedDeltaNetSpec(DeltaRuleSpec):
    """Gated delta net: the delta rule with one decay per head (arXiv 2412.06464).

    Attributes:
        gate: activation of the output gate.
        output_norm: an RMS norm, per head, of what is read from the state, before the gate.
    """

    letter: ClassVar[str] = "g"
    type: Literal["gated_delta_net"] = "gated_delta_net"
    gate: Literal["silu", "sigmoid", "none"] = "silu"
    output_norm: bool = True


class KimiDeltaAttentionSpec(DeltaRuleSpec):
    """Kimi delta attention: the delta rule with one decay per channel of the keys (arXiv 2510.26692).

    Attributes:
        gate: activation of the output gate, which is a projection of low rank.
        output_norm: an RMS norm, per head, of what is read from the state, before the gate.
        gate_rank: rank of the projections that give the decays and the output gate; default: `head_width`.
    """

    letter: ClassVar[str] = "k"
    type: Literal["kimi_delta_attention"] = "kimi_delta_attention"
    gate: Literal["silu", "sigmoid", "none"] = "sigmoid"
    output_norm: bool = True
    gate_rank: int | None = Field(default=None, gt=0)

    def _sizes(self, geometry: AttentionGeometry) -> dict[str, object]:
        return super()._sizes(geometry) | {"gate_rank": self.head_width or geometry.head_dim}

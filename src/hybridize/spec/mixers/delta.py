"""Linear attention with the delta rule: gated delta net and Kimi delta attention."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from hybridize.spec.mixers.base import AttentionGeometry, HasHeads


class DeltaRuleSpec(HasHeads):
    """What the two mixers with a delta rule share: heads with a state of `head_dim` x `head_dim`.

    Queries come in heads, keys and values in groups of heads, as the teacher's do.

    Attributes:
        head_dim: K and V, width of a head's keys and values; default: the teacher's head_dim.
        l2_norm: scale queries and keys to length 1 behind the convolution. Without it the delta rule is only stable
            where keys are short.
        gate: activation of the output gate.
        output_norm: an RMS norm, per head, of what is read from the state, before the gate.
    """

    head_dim: int | None = Field(default=None, gt=0)
    l2_norm: bool = True
    gate: Literal["silu", "sigmoid", "none"] = "silu"
    output_norm: bool = True

    @model_validator(mode="after")
    def _check_gate(self) -> Self:
        if self.gate_bias and self.gate == "none":
            raise ValueError("gate_bias is set, but gate is none; give it a gate, or no bias")
        return self

    def _sizes(self, geometry: AttentionGeometry) -> dict[str, object]:
        width = self.head_dim or geometry.head_dim
        return {
            "head_dim": width,
            **self._head_counts(geometry, width),
            **self._attention_sizes(geometry),
        }

    def resolve(self, geometry: AttentionGeometry) -> Self:
        """Return the spec with every size filled in from the teacher's attention.

        Raises:
            ValueError: the sizes do not divide one another.
        """
        return self._filled(self._sizes(geometry))


class GatedDeltaNetSpec(DeltaRuleSpec):
    """Gated delta net: the delta rule with one decay per head (arXiv 2412.06464)."""

    letter: ClassVar[str] = "g"
    type: Literal["gated_delta_net"] = "gated_delta_net"


class KimiDeltaAttentionSpec(DeltaRuleSpec):
    """Kimi delta attention: the delta rule with one decay per channel of the keys (arXiv 2510.26692).

    Attributes:
        gate_rank: rank of the projections that give the decays and the output gate; default: `head_dim`.
    """

    letter: ClassVar[str] = "k"
    type: Literal["kimi_delta_attention"] = "kimi_delta_attention"
    gate: Literal["silu", "sigmoid", "none"] = "sigmoid"
    gate_rank: int | None = Field(default=None, gt=0)

    def _sizes(self, geometry: AttentionGeometry) -> dict[str, object]:
        return super()._sizes(geometry) | {"gate_rank": self.head_dim or geometry.head_dim}

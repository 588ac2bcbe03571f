"""The sizes that mixers are derived from, and what all their specs share."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from hybridize.spec.base import Spec, explain

QKNorm = Literal["none", "head", "width"]


class AttentionGeometry(Spec):
    """The sizes of one attention layer of the teacher, all that a mixer's sizes are derived from.

    Attributes:
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        qkv_bias: whether the projections of queries, keys and values have biases.
        output_bias: whether the output projection has one.
        qk_norm: an RMS norm of queries and keys: of each `head` by itself, over the whole `width`, or `none`.
        norm_eps: what that norm adds to the mean square.
    """

    hidden_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QKNorm = "none"
    norm_eps: float = Field(default=1e-6, gt=0)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all key/value heads."""
        return self.num_kv_heads * self.head_dim


class Mixer(Spec):
    """One kind of sequence mixer, with sizes that may be open (`None`) until it is resolved.

    Attributes:
        type: its name.
        letter: stands for it where a layout is written as one word.
    """

    letter: ClassVar[str]
    type: str

    def resolve(self, geometry: AttentionGeometry) -> Self:
        """Return the spec with every open size filled in from the teacher's attention."""
        return self

    def _filled(self, sizes: dict[str, Any]) -> Self:
        """This spec with `sizes` where it leaves them open, checked once more."""
        still_open = {name: size for name, size in sizes.items() if getattr(self, name) is None}
        try:
            return type(self).model_validate(self.model_dump() | still_open)
        except ValidationError as error:
            raise ValueError(explain(error, "mixer")) from None


class CarriesAttention(Mixer):
    """What a mixer with queries, keys and values can keep of the attention it replaces.

    Attributes:
        qkv_bias: biases on the projections of queries, keys and values, or what stands for them; default: as the
            teacher's.
        output_bias: a bias on the output projection; default: as the teacher's.
        qk_norm: an RMS norm of queries and keys, or what stands for them, right behind their projections: of each
            `head`, over the `width` of all, or `none`; default: as the teacher's.
        norm_eps: what the norms add to the mean square; default: as the teacher's.
        gate_bias: a bias on the output gate, so that a gate can start open, the same for every token. The papers' gates
            have none.
    """

    gate_bias: bool = False
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    qk_norm: QKNorm | None = None
    norm_eps: float | None = Field(default=None, gt=0)

    def _attention_sizes(self, geometry: AttentionGeometry) -> dict[str, Any]:
        return {
            "qkv_bias": geometry.qkv_bias,
            "output_bias": geometry.output_bias,
            "qk_norm": geometry.qk_norm,
            "norm_eps": geometry.norm_eps,
        }


class TakesSteps(CarriesAttention):
    """A mixer whose decays come from step sizes that it computes for each token.

    Attributes:
        dt_min: smallest initial step size, in tokens.
        dt_max: largest initial step size, in tokens.
        dt_init_floor: initial step sizes are clamped to at least this.
    """

    dt_min: float = Field(default=1e-3, gt=0)
    dt_max: float = Field(default=1e-1, gt=0)
    dt_init_floor: float = Field(default=1e-4, gt=0)

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} exceeds dt_max {self.dt_max}; swap them")
        return self


class HasHeads(TakesSteps):
    """A mixer of heads, some of them sharing keys and values, whose convolution runs over all that enters the state.

    Attributes:
        num_heads: H; default: so many that all of the teacher's query channels have their place.
        num_groups: G, groups of heads that share what stands for keys and values; default: likewise for the teacher's.
        conv_kernel: taps of the causal depthwise convolution on what stands for queries, keys and values.
        conv_activation: what follows the convolution.
        decay_min: smallest initial decay rate, per unit of step size.
        decay_max: largest initial decay rate.
    """

    num_heads: int | None = Field(default=None, gt=0)
    num_groups: int | None = Field(default=None, gt=0)
    conv_kernel: int = Field(default=4, ge=2)
    conv_activation: Literal["silu", "none"] = "silu"
    decay_min: float = Field(default=1.0, gt=0)
    decay_max: float = Field(default=16.0, gt=0)

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.decay_min > self.decay_max:
            raise ValueError(f"decay_min {self.decay_min} exceeds decay_max {self.decay_max}; swap them")
        check_multiples({"num_heads": self.num_heads}, "num_groups", self.num_groups)
        return self

    def _head_counts(self, geometry: AttentionGeometry, width: int) -> dict[str, int]:
        """Heads and groups of `width` channels each, for all of the teacher's.

        Raises:
            ValueError: the width does not divide the teacher's.
        """
        if self.num_heads is None or self.num_groups is None:
            widths = {"the query width": geometry.query_width, "the key/value width": geometry.kv_width}
            check_multiples(widths, "head_dim", width)
        return {"num_heads": geometry.query_width // width, "num_groups": geometry.kv_width // width}


def check_multiples(sizes: Mapping[str, int | None], divisor_name: str, divisor: int | None) -> None:
    """Raise a `ValueError` if one of the named sizes is known and not a multiple of the divisor."""
    for name, size in sizes.items():
        if size is not None and divisor is not None and size % divisor:
            raise ValueError(f"{name} {size} is not a multiple of {divisor_name} {divisor}; change one")

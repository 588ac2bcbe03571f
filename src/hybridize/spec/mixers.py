"""Sequence mixers that a layer can have, as data: one frozen spec per kind, no torch.

A spec as a user writes it may leave sizes open (`None`); `resolve` fills them from the teacher's attention
geometry, and a converted checkpoint's config stores only resolved specs.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from hybridize.spec.base import Spec, choose, explain


class AttentionGeometry(Spec):
    """The sizes of one attention layer of the teacher, all that a mixer's sizes are derived from."""

    hidden_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


class AttentionSpec(Spec):
    """The teacher's own attention, left as it is."""

    type: Literal["attention"] = "attention"

    def resolve(self, geometry: AttentionGeometry) -> Self:
        """Return the spec itself: attention takes all its sizes from the teacher's config."""
        return self


class Mamba1Spec(Spec):
    """The paper's mixer: a Mamba-1 selective scan with per-head B and C (arXiv 2511.02651, 2312.00752).

    Attributes:
        state_size: N, states per channel. The paper: 16.
        d_inner: channels of the scan; default: query heads x head_dim, as in the paper.
        d_xb: width of x and B before they are repeated to d_inner; default: key/value heads x head_dim.
        dt_rank: rank of the step-size projection; default ceil(hidden_size / 16), as in Mamba.
        conv_kernel: taps of the causal depthwise convolution on x.
        dt_bias_mode: `single` adds the step-size bias once; `double` twice, as published checkpoints expect.
        dt_min: smallest initial step size, in tokens.
        dt_max: largest initial step size, in tokens.
        dt_init_floor: initial step sizes are clamped to at least this.
    """

    type: Literal["mamba1"] = "mamba1"
    state_size: int = Field(default=16, gt=0)
    d_inner: int | None = Field(default=None, gt=0)
    d_xb: int | None = Field(default=None, gt=0)
    dt_rank: int | None = Field(default=None, gt=0)
    conv_kernel: int = Field(default=4, ge=2)
    dt_bias_mode: Literal["single", "double"] = "single"
    dt_min: float = Field(default=1e-3, gt=0)
    dt_max: float = Field(default=1e-1, gt=0)
    dt_init_floor: float = Field(default=1e-4, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} exceeds dt_max {self.dt_max}; swap them")
        for name in ("d_inner", "d_xb"):
            width = getattr(self, name)
            if width is not None and width % self.state_size:
                raise ValueError(f"{name} {width} is not a multiple of state_size {self.state_size}; change one")
        if self.d_inner and self.d_xb and self.d_inner % self.d_xb:
            raise ValueError(f"d_inner {self.d_inner} is not a multiple of d_xb {self.d_xb}; change one")
        return self

    @property
    def num_heads(self) -> int:
        """H: heads of the scan, each of state_size channels with its own C."""
        assert self.d_inner is not None, "resolve the spec first"
        return self.d_inner // self.state_size

    @property
    def num_groups(self) -> int:
        """G: groups of heads that share B and the raw x."""
        assert self.d_xb is not None, "resolve the spec first"
        return self.d_xb // self.state_size

    def resolve(self, geometry: AttentionGeometry) -> Self:
        """Return the spec with every size filled in from the teacher's attention.

        Raises:
            ValueError: the sizes do not divide one another.
        """
        filled = {
            "d_inner": self.d_inner or geometry.num_heads * geometry.head_dim,
            "d_xb": self.d_xb or geometry.num_kv_heads * geometry.head_dim,
            "dt_rank": self.dt_rank or -(-geometry.hidden_size // 16),
        }
        try:
            return type(self).model_validate(self.model_dump() | filled)
        except ValidationError as error:
            raise ValueError(explain(error, "mixer")) from None


MixerSpec = Annotated[AttentionSpec | Mamba1Spec, Field(discriminator="type")]

MIXER_TYPES: dict[str, type[AttentionSpec] | type[Mamba1Spec]] = {
    "attention": AttentionSpec,
    "mamba1": Mamba1Spec,
}

_ADAPTER: TypeAdapter[AttentionSpec | Mamba1Spec] = TypeAdapter(MixerSpec)


def parse_mixer(value: object, place: str = "mixer") -> AttentionSpec | Mamba1Spec:
    """Read a mixer spec from a name (`"mamba1"`) or a mapping (`{"type": "mamba1", "state_size": 32}`).

    Raises:
        ValueError: naming `place`, the value and the remedy.
    """
    if isinstance(value, (AttentionSpec, Mamba1Spec)):
        return value
    if isinstance(value, str):
        return MIXER_TYPES[choose(place, value, MIXER_TYPES)]()
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        kind = MIXER_TYPES[choose(f"{place}.type", value["type"], MIXER_TYPES)]
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            raise ValueError(explain(error, place, kind.model_fields)) from None
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        raise ValueError(explain(error, place)) from None

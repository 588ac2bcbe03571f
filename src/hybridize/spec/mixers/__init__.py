"""Sequence mixers that a layer can have, as data: one frozen spec per kind, no torch.

A spec as a user writes it may leave sizes open (`None`); `resolve` fills them from the teacher's attention
geometry, and a converted checkpoint's config stores only resolved specs.
"""

from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from hybridize.spec.base import choose, explain
from hybridize.spec.mixers.attention import AttentionSpec, IdentitySpec, SlidingWindowSpec
from hybridize.spec.mixers.base import AttentionGeometry, CarriesAttention, Mixer, QKNorm
from hybridize.spec.mixers.delta import DeltaRuleSpec, GatedDeltaNetSpec, KimiDeltaAttentionSpec
from hybridize.spec.mixers.mamba import Mamba1Spec, Mamba2Spec

__all__ = [
    "MIXER_TYPES",
    "AttentionGeometry",
    "AttentionSpec",
    "CarriesAttention",
    "DeltaRuleSpec",
    "GatedDeltaNetSpec",
    "IdentitySpec",
    "KimiDeltaAttentionSpec",
    "Mamba1Spec",
    "Mamba2Spec",
    "Mixer",
    "MixerSpec",
    "QKNorm",
    "SlidingWindowSpec",
    "parse_mixer",
]

AnyMixer = (
    AttentionSpec
    | Mamba1Spec
    | Mamba2Spec
    | GatedDeltaNetSpec
    | KimiDeltaAttentionSpec
    | SlidingWindowSpec
    | IdentitySpec
)
MixerSpec = Annotated[AnyMixer, Field(discriminator="type")]

MIXER_TYPES: dict[str, type[AnyMixer]] = {
    "attention": AttentionSpec,
    "mamba1": Mamba1Spec,
    "mamba2": Mamba2Spec,
    "gated_delta_net": GatedDeltaNetSpec,
    "kimi_delta_attention": KimiDeltaAttentionSpec,
    "sliding_window": SlidingWindowSpec,
    "identity": IdentitySpec,
}

_ADAPTER: TypeAdapter[AnyMixer] = TypeAdapter(MixerSpec)


def parse_mixer(value: object, place: str = "mixer") -> AnyMixer:
    """Read a mixer spec from a name (`"mamba1"`) or a mapping (`{"type": "mamba1", "state_size": 32}`).

    Raises:
        ValueError: naming `place`, the value and the remedy.
    """
    if isinstance(value, tuple(MIXER_TYPES.values())):
        return value  # type: ignore[return-value]
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

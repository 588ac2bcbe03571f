"""What can be asked for: mixers, layouts, stages, the recipe. Frozen pydantic models; imports no torch."""

from hybridize.spec.layout import LayoutSpec
from hybridize.spec.mixers import (
    MIXER_TYPES,
    AttentionGeometry,
    AttentionSpec,
    GatedDeltaNetSpec,
    IdentitySpec,
    KimiDeltaAttentionSpec,
    Mamba1Spec,
    Mamba2Spec,
    MixerSpec,
    SlidingWindowSpec,
    parse_mixer,
)

__all__ = [
    "MIXER_TYPES",
    "AttentionGeometry",
    "AttentionSpec",
    "GatedDeltaNetSpec",
    "IdentitySpec",
    "KimiDeltaAttentionSpec",
    "LayoutSpec",
    "Mamba1Spec",
    "Mamba2Spec",
    "MixerSpec",
    "SlidingWindowSpec",
    "parse_mixer",
]

"""What can be asked for: mixers, layouts, stages, the recipe. Frozen pydantic models; imports no torch."""

from hybridize.spec.layout import LayoutSpec
from hybridize.spec.mixers import (
    MIXER_TYPES,
    AttentionGeometry,
    AttentionSpec,
    Mamba1Spec,
    MixerSpec,
    parse_mixer,
)

__all__ = [
    "MIXER_TYPES",
    "AttentionGeometry",
    "AttentionSpec",
    "LayoutSpec",
    "Mamba1Spec",
    "MixerSpec",
    "parse_mixer",
]

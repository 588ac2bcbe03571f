"""Sequence mixers: the modules that take an attention layer's place.

Each is one `Mixer` over the recurrences of `hybridize.ops`, built from a resolved spec of
`hybridize.spec.mixers`. They know shapes, documents, padding and state, and nothing of the model around them.
"""

from hybridize.mixers.base import Mixer, MixerState
from hybridize.mixers.gated_delta_net import GatedDeltaNetMixer
from hybridize.mixers.identity import IdentityMixer
from hybridize.mixers.kimi_delta_attention import KimiDeltaAttentionMixer
from hybridize.mixers.mamba1 import Mamba1Mixer
from hybridize.mixers.mamba2 import Mamba2Mixer
from hybridize.spec.base import Spec
from hybridize.spec.mixers import GatedDeltaNetSpec, IdentitySpec, KimiDeltaAttentionSpec, Mamba1Spec, Mamba2Spec

__all__ = [
    "MIXERS",
    "GatedDeltaNetMixer",
    "IdentityMixer",
    "KimiDeltaAttentionMixer",
    "Mamba1Mixer",
    "Mamba2Mixer",
    "Mixer",
    "MixerState",
    "build_mixer",
]

MIXERS: dict[type[Spec], type[Mixer]] = {
    GatedDeltaNetSpec: GatedDeltaNetMixer,
    IdentitySpec: IdentityMixer,
    KimiDeltaAttentionSpec: KimiDeltaAttentionMixer,
    Mamba1Spec: Mamba1Mixer,
    Mamba2Spec: Mamba2Mixer,
}


def build_mixer(spec: Spec, hidden_size: int, *, initializer_range: float = 0.02) -> Mixer:
    """Build the mixer that `spec` describes, with its constructor initialisation.

    Args:
        spec: a resolved mixer spec.
        hidden_size: width of the residual stream.
        initializer_range: standard deviation of the linear layers' initial weights.

    Raises:
        ValueError: no mixer goes with the spec (attention, windowed or not, stays the teacher's own module), or
            the spec is not resolved.
    """
    mixer = MIXERS.get(type(spec))
    if mixer is None:
        known = ", ".join(kind.__name__ for kind in MIXERS)
        raise ValueError(f"spec: no mixer is built from a {type(spec).__name__}; use one of {known}")
    return mixer(spec, hidden_size, initializer_range=initializer_range)

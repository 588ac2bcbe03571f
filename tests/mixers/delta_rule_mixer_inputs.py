"""Mixers with a delta rule, away from their initial values, and inputs for them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.mixers import build_mixer
from hybridize.mixers.delta_rule import DeltaRuleMixer
from hybridize.spec.mixers import AttentionGeometry, DeltaRuleSpec, GatedDeltaNetSpec, KimiDeltaAttentionSpec

HIDDEN = 20
GEOMETRY = AttentionGeometry(hidden_size=HIDDEN, num_heads=4, num_kv_heads=2, head_dim=6)
EVERYTHING = AttentionGeometry(
    **GEOMETRY.model_dump(exclude={"qkv_bias", "output_bias", "qk_norm", "norm_eps"}),
    qkv_bias=True,
    output_bias=True,
    qk_norm="head",
    norm_eps=1e-3,
)
EXACT = {"rtol": 1e-10, "atol": 1e-11}
SPECS: dict[str, type[DeltaRuleSpec]] = {"gated": GatedDeltaNetSpec, "kimi": KimiDeltaAttentionSpec}

both_kinds = pytest.mark.parametrize("kind", list(SPECS))


def make_mixer(
    kind: str, dtype: torch.dtype = torch.float64, geometry: AttentionGeometry = GEOMETRY, **changes: Any
) -> DeltaRuleMixer:
    if kind == "kimi":
        changes = {"gate_rank": 3} | changes
    mixer = build_mixer(SPECS[kind](**changes).resolve(geometry), HIDDEN, initializer_range=0.5)
    assert isinstance(mixer, DeltaRuleMixer)
    with torch.no_grad():  # away from the special values of the constructor
        for parameter in mixer.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return mixer.to(dtype)


def make_full_mixer(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> DeltaRuleMixer:
    """With every bias and norm there is."""
    return make_mixer(kind, dtype, EVERYTHING, gate_bias=True, **changes)


def make_hidden(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64)

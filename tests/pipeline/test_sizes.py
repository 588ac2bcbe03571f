"""Parameters counted from specs are those that the modules have."""

from dataclasses import replace

import pytest

from hybridize.mixers import build_mixer
from hybridize.pipeline.sizes import TeacherShape, mixer_parameters
from hybridize.spec import AttentionGeometry, IdentitySpec, SlidingWindowSpec, parse_mixer

SHAPE = TeacherShape(
    AttentionGeometry(hidden_size=48, num_heads=6, num_kv_heads=2, head_dim=16), 4, 96, 100, tied=False
)
RECURRENT = ("mamba1", "mamba2", "gated_delta_net", "kimi_delta_attention")


def count(spec, geometry):
    mixer = build_mixer(spec.resolve(geometry), geometry.hidden_size)
    return sum(parameter.numel() for parameter in mixer.parameters())


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate_bias": True, "qkv_bias": True, "output_bias": True, "qk_norm": "head"},
        {"qk_norm": "width", "conv_kernel": 3},
    ],
)
def test_counts_match_the_modules(kind, fields):
    spec = parse_mixer({"type": kind, **fields})
    assert mixer_parameters(spec, SHAPE) == count(spec, SHAPE.geometry)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "mamba1", "state_size": 8, "dt_rank": 5},
        {"type": "mamba2", "state_size": 8, "gate_norm": False},
        {"type": "mamba2", "state_size": 16, "head_dim": 8},
        {"type": "gated_delta_net", "head_dim": 8, "gate": "none"},
        {"type": "gated_delta_net", "output_norm": False},
        {"type": "kimi_delta_attention", "gate_rank": 3, "output_norm": False},
    ],
)
def test_counts_match_the_modules_of_other_sizes(fields):
    spec = parse_mixer(fields)
    assert mixer_parameters(spec, SHAPE) == count(spec, SHAPE.geometry)


def test_what_the_teacher_has_is_carried():
    geometry = SHAPE.geometry.model_copy(update={"qkv_bias": True, "output_bias": True, "qk_norm": "head"})
    for kind in RECURRENT:
        spec = parse_mixer(kind)
        assert mixer_parameters(spec, replace(SHAPE, geometry=geometry)) == count(spec, geometry)
        assert count(spec, geometry) > count(spec, SHAPE.geometry)


def test_a_window_is_the_teachers_attention_and_an_identity_nothing():
    assert mixer_parameters(SlidingWindowSpec(), SHAPE) == SHAPE.attention_parameters
    assert mixer_parameters(SlidingWindowSpec(sink=True), SHAPE) == SHAPE.attention_parameters + 6
    assert mixer_parameters(IdentitySpec(), SHAPE) == 0

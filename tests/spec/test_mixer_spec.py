import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hybridize.spec import (
    MIXER_TYPES,
    AttentionGeometry,
    AttentionSpec,
    GatedDeltaNetSpec,
    KimiDeltaAttentionSpec,
    Mamba1Spec,
    Mamba2Spec,
    SlidingWindowSpec,
    parse_mixer,
)

# Apriel-Nemotron-15B-Thinker's attention
PAPER = AttentionGeometry(hidden_size=5120, num_heads=32, num_kv_heads=8, head_dim=128)


def test_the_papers_sizes_follow_from_the_papers_teacher():
    spec = Mamba1Spec().resolve(PAPER)
    assert (spec.state_size, spec.d_inner, spec.d_xb, spec.dt_rank) == (16, 4096, 1024, 320)
    assert (spec.num_heads, spec.num_groups) == (256, 64)
    assert spec.conv_kernel == 4
    assert PAPER.group_size == 4


@settings(deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([1, 2]),
    slices=st.sampled_from([1, 2, 4]),
    hidden=st.integers(1, 200),
    rank=st.one_of(st.none(), st.integers(1, 50)),
)
def test_resolving_keeps_what_is_given_and_fills_the_rest(heads, group, slices, hidden, rank):
    geometry = AttentionGeometry(hidden_size=hidden, num_heads=heads, num_kv_heads=heads // group, head_dim=8 * slices)
    spec = Mamba1Spec(state_size=8, dt_rank=rank).resolve(geometry)
    assert spec.dt_rank == (rank or -(-hidden // 16))
    assert spec.d_inner == heads * 8 * slices
    assert spec.d_inner == group * spec.d_xb
    assert spec.num_heads == group * spec.num_groups
    assert spec.resolve(geometry) == spec
    assert parse_mixer(spec.model_dump(mode="json")) == spec


def test_given_widths_win():
    spec = Mamba1Spec(d_inner=64, d_xb=32).resolve(PAPER)
    assert (spec.d_inner, spec.d_xb) == (64, 32)


def test_sizes_that_do_not_divide_are_named_when_resolved():
    odd = AttentionGeometry(hidden_size=64, num_heads=3, num_kv_heads=1, head_dim=8)
    with pytest.raises(ValueError, match="mixer: d_inner 24 is not a multiple of state_size 16; change one"):
        Mamba1Spec().resolve(odd)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_inner": 24}, "d_inner 24 is not a multiple of state_size 16; change one"),
        ({"d_xb": 8}, "d_xb 8 is not a multiple of state_size 16; change one"),
        ({"d_inner": 48, "d_xb": 32}, "d_inner 48 is not a multiple of d_xb 32; change one"),
        ({"dt_min": 0.5}, "dt_min 0.5 exceeds dt_max 0.1; swap them"),
        ({"conv_kernel": 1}, "greater than or equal to 2"),
        ({"state_size": 0}, "greater than 0"),
    ],
)
def test_unsound_fields_are_named(fields, message):
    with pytest.raises(ValidationError, match=message):
        Mamba1Spec(**fields)


def test_mixers_are_read_from_names_mappings_and_specs():
    assert parse_mixer("attention") == AttentionSpec()
    assert parse_mixer("mamba1") == Mamba1Spec()
    assert parse_mixer({"type": "mamba1", "state_size": 32}) == Mamba1Spec(state_size=32)
    assert parse_mixer(Mamba1Spec(dt_rank=2)) == Mamba1Spec(dt_rank=2)
    assert AttentionSpec().resolve(PAPER) == AttentionSpec()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mamba", r"^here: 'mamba' is unknown; use one of attention, mamba1, .*; did you mean 'mamba2'\?$"),
        ({"type": "gru"}, r"^here\.type: 'gru' is unknown; use one of attention, mamba1, .*, identity$"),
        ({"type": "mamba1", "state_sze": 4}, r"^here\.state_sze: unknown key; did you mean 'state_size'\?$"),
        ({"type": "mamba1", "zzz": 4}, r"^here\.zzz: unknown key; remove it$"),
        ({"type": "mamba1", "d_inner": 24}, r"^here: d_inner 24 is not a multiple of state_size 16"),
        ({"state_size": 4}, r"^here: its kind is missing; add type$"),
        (7, r"^here: 7 is not a mapping; write keys and values$"),
    ],
)
def test_what_is_no_mixer_is_named_with_the_remedy(value, message):
    with pytest.raises(ValueError, match=message):
        parse_mixer(value, "here")


@pytest.mark.parametrize("name", MIXER_TYPES)
def test_every_mixer_is_resolved_by_the_teachers_attention_and_survives_plain_data(name):
    geometry = AttentionGeometry(
        hidden_size=48, num_heads=6, num_kv_heads=2, head_dim=16, qkv_bias=True, qk_norm="head", norm_eps=1e-5
    )
    spec = parse_mixer(name).resolve(geometry)
    assert all(getattr(spec, field) is not None for field in type(spec).model_fields)
    assert parse_mixer(spec.model_dump(mode="json")) == spec
    assert spec.resolve(PAPER) == spec
    if "qkv_bias" in type(spec).model_fields:
        assert (spec.qkv_bias, spec.output_bias, spec.qk_norm, spec.norm_eps) == (True, False, "head", 1e-5)


def test_letters_stand_for_one_mixer_each():
    assert len({kind.letter for kind in MIXER_TYPES.values()}) == len(MIXER_TYPES)


def test_heads_of_mamba2_and_the_delta_rules_are_the_teachers_or_slices_of_them():
    mamba2 = Mamba2Spec().resolve(PAPER)
    assert (mamba2.state_size, mamba2.head_dim, mamba2.num_heads, mamba2.num_groups) == (128, 128, 32, 8)
    sliced = Mamba2Spec(state_size=16).resolve(PAPER)
    assert (sliced.state_size, sliced.head_dim, sliced.num_heads, sliced.num_groups) == (16, 16, 256, 64)
    delta = GatedDeltaNetSpec().resolve(PAPER)
    assert (delta.head_dim, delta.num_heads, delta.num_groups) == (128, 32, 8)
    kimi = KimiDeltaAttentionSpec(head_dim=32).resolve(PAPER)
    assert (kimi.head_dim, kimi.num_heads, kimi.num_groups, kimi.gate_rank) == (32, 128, 32, 32)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Mamba2Spec, {"head_dim": 48}, "the query width 4096 is not a multiple of head_dim 48; change one"),
        (GatedDeltaNetSpec, {"num_heads": 6, "num_groups": 4}, "num_heads 6 is not a multiple of num_groups 4"),
        (KimiDeltaAttentionSpec, {"dt_min": 1.0}, "dt_min 1.0 exceeds dt_max 0.1; swap them"),
        (Mamba2Spec, {"decay_min": 20}, "decay_min 20.0 exceeds decay_max 16.0; swap them"),
        (SlidingWindowSpec, {"window": 0}, "greater than 0"),
    ],
)
def test_sizes_of_the_other_mixers_that_do_not_fit_are_named(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields).resolve(PAPER)

"""Which parameters weight decay acts on."""

import pytest

from hybridize.mixers import build_mixer
from hybridize.spec import AttentionGeometry, parse_mixer
from hybridize.training.parameters import decays

GEOMETRY = AttentionGeometry(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=8)
OPTIONS = {"qkv_bias": True, "output_bias": True, "gate_bias": True, "qk_norm": "head"}


@pytest.mark.parametrize(
    ("kind", "decaying"),
    [
        ("mamba1", {"in_proj.weight", "dt_in_proj.weight", "dt_proj.weight", "conv1d.weight", "out_proj.weight"}),
        ("mamba2", {"in_proj.weight", "conv1d.weight", "out_proj.weight"}),
        ("gated_delta_net", {*(f"{name}_proj.weight" for name in "qkvoabg"), "conv1d.weight"}),
        (
            "kimi_delta_attention",
            {
                *(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "b", "f_a", "f_b", "g_a", "g_b")),
                "conv1d.weight",
            },
        ),
    ],
)
def test_weight_decay_acts_on_matrices_only_and_spares_decays_steps_biases_and_norms(kind, decaying):
    mixer = build_mixer(parse_mixer({"type": kind, **OPTIONS}).resolve(GEOMETRY), 24)
    names = dict(mixer.named_parameters())
    assert {
        name for name, parameter in names.items() if decays(f"model.layers.0.self_attn.mixer.{name}", parameter)
    } == decaying
    assert {"A_log", "gate_bias"} <= names.keys() - decaying

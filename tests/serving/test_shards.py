"""Mixers divided among ranks: the parts' outputs add up to the whole's, for every kind, and every tensor has a rule."""

import pytest
import torch

from hybridize.mixers import MIXERS, build_mixer
from hybridize.serving.shards import Once, part_of_spec, shard_rules, take_part
from hybridize.spec.mixers import (
    AttentionGeometry,
    GatedDeltaNetSpec,
    KimiDeltaAttentionSpec,
    Mamba1Spec,
    Mamba2Spec,
    SlidingWindowSpec,
)

HIDDEN, RANKS = 24, 2
GEOMETRY = AttentionGeometry(hidden_size=HIDDEN, num_heads=8, num_kv_heads=4, head_dim=6)
PLAIN = {"qkv_bias": False, "output_bias": False, "qk_norm": "none"}
FULL = {"qkv_bias": True, "output_bias": True, "qk_norm": "head", "gate_bias": True}
SPECS = {
    "mamba1": Mamba1Spec(state_size=3, **PLAIN),
    "mamba1-full": Mamba1Spec(state_size=3, **FULL),
    "mamba2": Mamba2Spec(head_dim=6, state_size=5, **PLAIN),
    "mamba2-full": Mamba2Spec(head_dim=6, state_size=3, **FULL),
    "gated_delta_net": GatedDeltaNetSpec(**PLAIN),
    "gated_delta_net-full": GatedDeltaNetSpec(**FULL),
    "gated_delta_net-ungated": GatedDeltaNetSpec(gate="none", output_norm=False, **PLAIN),
    "kimi_delta_attention": KimiDeltaAttentionSpec(gate_rank=5, **PLAIN),
    "kimi_delta_attention-full": KimiDeltaAttentionSpec(gate_rank=5, **FULL),
}


def resolved(name):
    return SPECS[name].resolve(GEOMETRY)


def whole_mixer(spec):
    torch.manual_seed(1)
    mixer = build_mixer(spec, HIDDEN, initializer_range=0.4)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return mixer.double()


def parts_of(mixer, spec, num_ranks):
    rules = shard_rules(spec)
    parts = []
    for rank in range(num_ranks):
        part = build_mixer(part_of_spec(spec, num_ranks, "layer 0"), HIDDEN).double()
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                whole = mixer.get_parameter(name)
                parameter.copy_(take_part(whole, rules.get(name), rank, num_ranks))
        parts.append(part)
    return parts


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", SPECS)
def test_parts_add_up_to_the_whole(name, num_ranks):
    spec = resolved(name)
    mixer = whole_mixer(spec)
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        expected, state = mixer(hidden[:, :8], return_state=True)
        expected_next, _ = mixer(hidden[:, 8:], state=state, return_state=True)
        outputs = [part(hidden[:, :8], return_state=True) for part in parts_of(mixer, spec, num_ranks)]
        steps = [
            part(hidden[:, 8:], state=part_state, return_state=True)[0]
            for part, (_, part_state) in zip(parts_of(mixer, spec, num_ranks), outputs, strict=True)
        ]
    torch.testing.assert_close(sum(out for out, _ in outputs), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sum(steps), expected_next, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SPECS)
def test_parts_have_their_share_of_the_state(name):
    spec = resolved(name)
    whole = build_mixer(spec, HIDDEN).state_shapes(1)
    part = build_mixer(part_of_spec(spec, RANKS, "layer 0"), HIDDEN).state_shapes(1)
    for key, shape in whole.items():
        assert torch.Size(shape).numel() == RANKS * torch.Size(part[key]).numel()


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "gated_delta_net", "kimi_delta_attention"])
def test_rules_name_tensors_that_exist(kind):
    names = {name for name, _ in build_mixer(resolved(f"{kind}-full"), HIDDEN).named_parameters()}
    optional = {"q_proj.bias", "g_proj.weight", "f_b_proj.weight", "g_b_proj.weight", "a_proj.weight"}
    assert shard_rules(resolved(f"{kind}-full")).keys() - names <= optional


def test_every_kind_with_a_state_is_tested_and_has_rules():
    geometry = GEOMETRY.model_copy(update={"head_dim": 16})
    stateful = {kind for kind in MIXERS if build_mixer(kind().resolve(geometry), HIDDEN).state_shapes(1)}
    assert stateful == {type(spec) for spec in SPECS.values()}
    assert all(shard_rules(kind().resolve(geometry)) for kind in stateful)


def test_ranks_that_do_not_divide_the_groups_are_refused():
    with pytest.raises(
        ValueError, match=r"3 does not divide the 4 groups of layer 7 .gated_delta_net.; use one of 1, 2, 4"
    ):
        part_of_spec(resolved("gated_delta_net"), 3, "layer 7")


def test_norms_over_all_heads_are_not_divided():
    spec = resolved("mamba2").model_copy(update={"qk_norm": "width"})
    assert part_of_spec(spec, 1, "layer 0") == spec
    with pytest.raises(ValueError, match=r"qk_norm: width.*use 1"):
        part_of_spec(spec, 2, "layer 0")


def test_mixers_without_groups_are_whole_on_every_rank():
    assert part_of_spec(SlidingWindowSpec(), 8, "layer 0") == SlidingWindowSpec()


def test_what_is_summed_is_given_once():
    bias = torch.ones(3)
    assert [take_part(bias, Once(), rank, 2).sum().item() for rank in range(2)] == [3.0, 0.0]

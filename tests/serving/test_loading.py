"""Loading: every tensor of a hybrid's own layers is accounted for; the rest passes by, and no bias is lost."""

import pytest
import torch
from torch import nn

from hybridize.serving.loading import HybridWeights, Target, without_lost_biases
from hybridize.serving.shards import Shard


def make(rank=0, num_ranks=1):
    targets = {
        "layers.1.self_attn.mixer.A_log": Target(nn.Parameter(torch.zeros(4 // num_ranks)), Shard((4,))),
        "layers.1.self_attn.mixer.norm.weight": Target(nn.Parameter(torch.zeros(2)), None),
    }
    return HybridWeights(targets, ["layers.1.self_attn."], ["layers.5.self_attn."], rank, num_ranks)


WHOLE = {
    "layers.1.self_attn.mixer.A_log": torch.arange(4.0),
    "layers.0.self_attn.q_proj.weight": torch.ones(1),
    "layers.1.self_attn.mixer.norm.weight": torch.ones(2),
    "layers.5.self_attn.mixer.A_log": torch.ones(9),
    "layers.1.mlp.up_proj.weight": torch.ones(1),
}


def test_what_is_not_a_mixers_passes_by():
    weights = make()
    rest = dict(weights.take(WHOLE.items()))
    assert list(rest) == ["layers.0.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight"]
    weights.check_complete({})
    assert weights.loaded == weights.targets.keys()
    assert weights.targets["layers.1.self_attn.mixer.A_log"].parameter.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_rank_gets_its_part():
    weights = make(rank=1, num_ranks=2)
    list(weights.take(WHOLE.items()))
    assert weights.targets["layers.1.self_attn.mixer.A_log"].parameter.tolist() == [2.0, 3.0]


def test_a_missing_tensor_is_named():
    weights = make()
    list(weights.take((name, t) for name, t in WHOLE.items() if "norm" not in name))
    with pytest.raises(ValueError, match=r"lacks tensors .*layers\.1\.self_attn\.mixer\.norm\.weight; convert"):
        weights.check_complete({})


def test_a_missing_tensor_of_the_teacher_is_named():
    weights = make()
    list(weights.take(WHOLE.items()))
    expected = {name: tensor.numel() for name, tensor in WHOLE.items()}
    weights.check_complete(expected)
    with pytest.raises(ValueError, match=r"lacks tensors .*: layers\.1\.mlp\.down_proj\.weight; convert"):
        weights.check_complete(expected | {"layers.1.mlp.down_proj.weight": 3})


def test_experts_are_counted_where_a_checkpoint_has_them_one_by_one():
    weights = make()
    stream = {f"layers.0.mlp.experts.{e}.up_proj.weight": torch.ones(2, 3) for e in range(4)}
    list(weights.take((WHOLE | stream).items()))
    weights.check_complete({"layers.0.mlp.experts.up_proj": 24})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.up_proj"):
        weights.check_complete({"layers.0.mlp.experts.up_proj": 30})


def test_an_unknown_tensor_of_a_mixer_is_named():
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight: .*has none of that name"):
        list(make().take({"layers.1.self_attn.q_proj.weight": torch.ones(1)}.items()))


@pytest.mark.parametrize("shape", [(5,), (2,), (4, 1), ()])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_another_shape_is_named(shape, num_ranks):
    weights = make(num_ranks=num_ranks)
    with pytest.raises(ValueError, match=r"A_log: the checkpoint's tensor has .*convert the model again"):
        list(weights.take({"layers.1.self_attn.mixer.A_log": torch.ones(shape)}.items()))


def test_a_bias_that_would_be_lost_is_named():
    parameters = {"a.qkv_proj.bias", "a.o_proj.weight"}
    packed = {"qkv_proj": ["q_proj", "k_proj"]}
    kept = {"a.q_proj.bias": torch.ones(1), "a.o_proj.weight": torch.ones(1)}
    assert dict(without_lost_biases(kept.items(), parameters, packed)) == kept
    with pytest.raises(ValueError, match=r"a\.o_proj\.bias: .*no such bias"):
        list(without_lost_biases({"a.o_proj.bias": torch.ones(1)}.items(), parameters, packed))

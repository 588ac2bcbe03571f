"""A whole model's conversion: a plan for every tensor, and layers that do not depend on one another."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hybridize.models import attention_module, convert_model, load_teacher, swap_layer
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.transfer import INITS, convert, plan_conversion, replace_layer

MIXER = Mamba1Spec(state_size=4)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
TOKENS = torch.arange(2, 18).reshape(2, 8)


def build_teacher(family, **changes):
    torch.manual_seed(0)
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES | {"sliding_window": 6} | changes)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


@pytest.fixture(params=["llama", "mistral"])
def teacher(request):
    return build_teacher(request.param)


def layout(*replaced, num_layers=4):
    return LayoutSpec.replace(num_layers, replaced, MIXER)


@pytest.mark.parametrize("init", INITS)
def test_plan_covers_every_tensor_of_both_models(teacher, init):
    hybrid, plan = convert(teacher, layout(0, 2), init)
    plan.check(teacher.state_dict(), hybrid.state_dict())
    assert set(plan.transfers) == {0, 2}
    for name in plan.untouched:
        assert torch.equal(hybrid.state_dict()[name], teacher.state_dict()[name]), name


def test_plan_from_names_alone_is_the_plan_that_is_followed(teacher):
    _, plan = convert(teacher, layout(1))
    assert plan_conversion(teacher.config, list(teacher.state_dict()), layout(1)) == plan


def test_unaccounted_tensors_are_an_error(teacher):
    hybrid, plan = convert(teacher, layout(1))
    with pytest.raises(ValueError, match=r"every tensor of the teacher; unmentioned: \['extra'\]"):
        plan.check([*teacher.state_dict(), "extra"], hybrid.state_dict())
    short = dataclasses.replace(plan, untouched=plan.untouched[1:])
    with pytest.raises(ValueError, match=r"unmentioned: \['model\.embed_tokens\.weight'\]"):
        short.check(teacher.state_dict(), hybrid.state_dict())


def test_weights_arrive_in_the_hybrid(teacher):
    hybrid, _ = convert(teacher, layout(1), "published")
    rows = attention_module(hybrid, 1).mixer.in_proj.weight[32:].split([16, 16, 32])
    attention = attention_module(teacher, 1)
    for row, name in zip(rows, ("v_proj", "k_proj", "q_proj"), strict=True):
        assert torch.equal(row, getattr(attention, name).weight)


def test_no_layer_replaced_is_the_teacher_bit_for_bit(teacher):
    hybrid, plan = convert(teacher, layout())
    assert torch.equal(hybrid(TOKENS).logits, teacher(TOKENS).logits)
    assert plan.transfers == {}


def test_layers_draws_depend_on_seed_and_layer_only(teacher):
    state = torch.get_rng_state()
    one, _ = convert(teacher, layout(2), seed=5)
    both, _ = convert(teacher, layout(0, 2), seed=5)
    other, _ = convert(teacher, layout(0, 2), seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [attention_module(model, 2).mixer.in_proj.weight[:32] for model in (one, both, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    assert not torch.equal(attention_module(both, 0).mixer.in_proj.weight[:32], drawn[1])


def test_layer_by_layer_equals_all_at_once(teacher):
    once, _ = convert(teacher, layout(0, 2), seed=3)
    first, _ = convert(teacher, layout(2), seed=3)
    staged, plan = convert(first, layout(0, 2), seed=3)
    assert set(plan.transfers) == {0}
    in_place = convert_model(teacher, layout(), share=True)
    old = [replace_layer(in_place, layer, MIXER, seed=3) for layer in (0, 2)]
    for model in (staged, in_place):
        assert torch.equal(model(TOKENS).logits, once(TOKENS).logits)
        assert str(model.config.layout) == "mama"
    for layer, module in zip((0, 2), old, strict=True):
        swap_layer(in_place, layer, module)
    assert torch.equal(in_place(TOKENS).logits, teacher(TOKENS).logits)


def test_only_attention_can_be_replaced(teacher):
    hybrid, _ = convert(teacher, layout(1))
    for layer in (1, 4, -1):
        with pytest.raises(ValueError, match=f"layer: {layer} is not an attention layer of the layout amaa"):
            replace_layer(hybrid, layer, MIXER)


@pytest.mark.parametrize("init", INITS)
def test_attention_bias_is_carried_or_dropped_and_told(init):
    teacher = build_teacher("llama", attention_bias=True)
    biases = {f"model.layers.1.self_attn.{name}_proj.bias" for name in "qkvo"}
    hybrid, plan = convert(teacher, layout(1), init)
    assert (biases <= plan.dropped.keys()) == (init == "random")
    assert init == "random" or not plan.dropped
    hybrid(TOKENS)
    bare = LayoutSpec.replace(4, [1], Mamba1Spec(state_size=4, qkv_bias=False, output_bias=False))
    hybrid, plan = convert(teacher, bare, init)
    assert biases <= plan.dropped.keys()
    if init != "random":
        assert biases == plan.dropped.keys()
        lines = str(plan).splitlines()
        assert lines[0].endswith(", 4 dropped")
        assert "  o_proj.bias: dropped, since the mamba1 mixer is to have no such bias" in lines
    hybrid(TOKENS)


def test_tensor_that_nobody_knows_is_an_error(teacher):
    names = [*teacher.state_dict(), "model.layers.1.self_attn.sinks"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.sinks.*no place.*init 'random'"):
        plan_conversion(teacher.config, names, layout(1))
    assert "model.layers.1.self_attn.sinks" in plan_conversion(teacher.config, names, layout(1), "random").dropped


def test_misfit_names_the_layer(teacher):
    wide = LayoutSpec.replace(4, [3], Mamba1Spec(state_size=4, d_inner=64))
    with pytest.raises(ValueError, match=r"layout\[3\]\.d_inner: 64 differs from the teacher's 32"):
        convert(teacher, wide)
    convert(teacher, wide, "random")[0](TOKENS)


def test_plan_summarises_untouched_layers_and_spells_out_replaced_ones(teacher):
    text = str(convert(teacher, layout(1))[1])
    lines = text.splitlines()
    assert lines[0].startswith(f"{teacher.config.model_type}, 4 layers, layout amaa: 1 newly replaced, ")
    assert "layer 0: stays attention, 9 tensors untouched" in lines
    assert "layer 1: becomes mamba1 by init 'aligned', 5 tensors untouched" in lines
    assert "  mixer.D [32] = init: 1" in lines
    assert any(line.startswith("  mixer.out_proj.weight [32 x 32] = the columns of o_proj.weight") for line in lines)


def test_bfloat16_conversion_keeps_dtype_and_fp32_scan(teacher):
    hybrid, _ = convert(teacher.to(torch.bfloat16), layout(1))
    mixer = attention_module(hybrid, 1).mixer
    assert (mixer.in_proj.weight.dtype, mixer.A_log.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(mixer.A_log, torch.arange(1.0, 5).log().expand(32, 4))


def test_trained_model_converts_and_is_the_teacher_with_no_layer_replaced():
    data = Path(os.environ.get("HYBRIDIZE_DATA", Path(__file__).parents[3] / "shared" / "data"))
    folder = data / "models" / "stories260K_hf"
    if not folder.is_dir():
        pytest.skip(f"no trained model at {folder}; set HYBRIDIZE_DATA")
    teacher = load_teacher(folder)
    same, _ = convert(teacher, layout(num_layers=5))
    assert torch.equal(same(TOKENS).logits, teacher(TOKENS).logits)
    for init in INITS:
        hybrid, _ = convert(teacher, layout(1, 3, num_layers=5), init)
        tokens = hybrid.generate(TOKENS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)
        again = hybrid.generate(TOKENS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=False)
        assert torch.equal(tokens, again)

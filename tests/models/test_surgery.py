"""Surgery keeps every tensor it does not replace, by name and bits, and can be undone."""

import pytest
import torch

from hybridize.models import attention_module, convert_model, geometry_of, layout_of, swap_layer
from hybridize.spec import AttentionSpec, IdentitySpec, LayoutSpec, Mamba1Spec

MIXER = Mamba1Spec(state_size=4)


def test_untouched_tensors_keep_name_and_bits(teacher, hybrid):
    before, after = teacher.state_dict(), hybrid.state_dict()
    gone = ("model.layers.0.self_attn.", "model.layers.2.self_attn.")
    kept = {name for name in before if not name.startswith(gone)}
    assert kept == {name for name in after if ".mixer." not in name}
    for name in kept:
        assert torch.equal(before[name], after[name]), name
        assert before[name].data_ptr() != after[name].data_ptr(), name


def test_a_kinds_default_stands_for_the_mixer_that_is_there(hybrid):
    there = hybrid.config.layout.layers[0]
    assert there != Mamba1Spec().resolve(geometry_of(hybrid.config))
    layers = [Mamba1Spec(), IdentitySpec(), Mamba1Spec(), *(AttentionSpec() for _ in hybrid.config.layout.layers[3:])]
    further = convert_model(hybrid, LayoutSpec(layers=tuple(layers)))
    assert further.config.layout.layers[0] == further.config.layout.layers[2] == there
    with pytest.raises(ValueError, match=r"layout\[0\]: .* mamba1 already .* with state_size 8 in place of 4; keep it"):
        convert_model(hybrid, LayoutSpec(layers=(Mamba1Spec(state_size=8), *layers[1:])))
    with pytest.raises(ValueError, match=r"layout\[0\]: .* mamba1 already .* cannot become identity; keep it"):
        convert_model(hybrid, LayoutSpec(layers=(IdentitySpec(), *layers[1:])))


def test_shared_conversion_uses_the_teachers_memory(teacher, make_hybrid):
    hybrid = make_hybrid(teacher, [1], share=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert hybrid.state_dict()[name].data_ptr() == teacher.state_dict()[name].data_ptr()


def test_conversion_leaves_the_teacher_as_it_was(teacher, make_hybrid, draw_tokens):
    tokens = draw_tokens(1, 9)
    before = teacher(tokens).logits
    teacher.generation_config.max_new_tokens = 7
    hybrid = make_hybrid(teacher, [0, 2]).train()
    hybrid(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(hybrid.parameters(), lr=0.1).step()
    assert torch.equal(teacher(tokens).logits, before)
    assert hybrid.generation_config.max_new_tokens == 7
    assert hybrid.generation_config is not teacher.generation_config


def test_tied_embeddings_stay_tied(make_teacher, make_hybrid):
    hybrid = make_hybrid(make_teacher("llama"), [1])
    assert hybrid.lm_head.weight is hybrid.model.embed_tokens.weight


def test_bfloat16_teacher_gives_a_bfloat16_hybrid_with_fp32_scan(teacher, make_hybrid, draw_tokens):
    hybrid = make_hybrid(teacher.to(torch.bfloat16), [0, 2])
    dtypes = {name: tensor.dtype for name, tensor in hybrid.state_dict().items()}
    fp32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {name.partition(".mixer.")[2] for name in fp32} == {"A_log", "D", "dt_proj.bias"}
    exact = torch.arange(1.0, 5).log().expand(32, 4)
    assert torch.equal(hybrid.state_dict()["model.layers.0.self_attn.mixer.A_log"], exact)
    assert hybrid(draw_tokens(1, 5)).logits.dtype == torch.bfloat16


def test_more_layers_can_be_replaced_later(teacher, make_hybrid, draw_tokens):
    first = make_hybrid(teacher, [0])
    second = make_hybrid(first, [0, 2])
    assert second.config.layout.replaced == (0, 2)
    name = "model.layers.0.self_attn.mixer.in_proj.weight"
    assert torch.equal(second.state_dict()[name], first.state_dict()[name])
    second(draw_tokens(1, 5))


def test_mixer_cannot_turn_back_into_attention(hybrid):
    layout = LayoutSpec.replace(4, [2], MIXER)
    with pytest.raises(ValueError, match=r"layout\[0\]: the model's layer is a mamba1 already"):
        convert_model(hybrid, layout)


def test_layout_of_another_length_is_an_error(teacher):
    with pytest.raises(ValueError, match="layout: it has 3 layers, but the model has 4"):
        convert_model(teacher, LayoutSpec.replace(3, [0], MIXER))


def test_swapped_layer_can_be_swapped_back(teacher, make_hybrid, draw_tokens):
    tokens = draw_tokens(1, 9)
    hybrid = make_hybrid(teacher, [], share=True)
    old = swap_layer(hybrid, 2, MIXER)
    assert str(layout_of(hybrid.config)) == "aama"
    assert hybrid.config.layer_types[2] == "linear_attention"
    assert not torch.allclose(hybrid(tokens).logits, teacher(tokens).logits)
    assert torch.equal(
        hybrid.generate(tokens, max_new_tokens=4), hybrid.generate(tokens, max_new_tokens=4, use_cache=False)
    )
    mixer = swap_layer(hybrid, 2, old)
    assert torch.equal(hybrid(tokens).logits, teacher(tokens).logits)
    swap_layer(hybrid, 2, mixer)
    assert attention_module(hybrid, 2) is mixer
    assert str(layout_of(hybrid.config)) == "aama"


def test_swap_errors_name_the_remedy(teacher, hybrid):
    with pytest.raises(ValueError, match="is not a hybrid; make one with convert_model"):
        swap_layer(teacher, 0, MIXER)
    with pytest.raises(ValueError, match=r"no layer 4; it has 4, use 0\.\.3"):
        swap_layer(hybrid, 4, MIXER)
    with pytest.raises(ValueError, match="hand over the module that was swapped out"):
        swap_layer(hybrid, 0, AttentionSpec())

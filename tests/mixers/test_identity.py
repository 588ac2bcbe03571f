"""The identity adds nothing and remembers nothing, and generation with a cache still counts tokens."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hybridize.mixers import MIXERS, IdentityMixer, build_mixer
from hybridize.models import attention_module, convert_model
from hybridize.spec import IdentitySpec, LayoutSpec, Mamba1Spec

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build_teacher(family):
    torch.manual_seed(0)
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def convert(family, replaced, others=()):
    layout = LayoutSpec.replace(3, replaced, IdentitySpec()).with_replaced(others, Mamba1Spec(state_size=4))
    return convert_model(build_teacher(family), layout)


def test_output_is_zero_and_there_is_no_state():
    mixer = build_mixer(IdentitySpec(), 32)
    assert MIXERS[IdentitySpec] is type(mixer) is IdentityMixer
    hidden = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    out, state = mixer(hidden, return_state=True)
    assert torch.equal(out, torch.zeros_like(hidden))
    assert state is None
    assert list(mixer.state_dict()) == []
    assert mixer.state_shapes(2) == {}
    assert mixer.state_bytes(torch.float32, 2) == 0
    mixer.reset_parameters()


def test_gradient_is_zero_but_there():
    """Also where the input is not finite."""
    hidden = torch.tensor([[[1.0, float("inf")]]], requires_grad=True)
    out, _ = build_mixer(IdentitySpec(), 2)(hidden)
    assert torch.equal(out, torch.zeros(1, 1, 2))
    out.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(1, 1, 2))


def test_layer_is_its_mlp_alone():
    """The residual stream passes attention by unchanged."""
    hybrid = convert("llama", (1,))
    layer, hidden = hybrid.model.layers[1], torch.randn(2, 5, 32)
    positions = hybrid.model.rotary_emb(hidden, torch.arange(5)[None])
    expected = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    torch.testing.assert_close(layer(hidden, position_embeddings=positions), expected)
    assert list(attention_module(hybrid, 1).parameters()) == []


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("replaced", "others"), [((0,), ()), ((0, 1, 2), ()), ((0, 2), (1,)), ((1,), (0, 2))], ids=str)
def test_generation_and_padding_work_with_whatever_else_there_is(family, replaced, others):
    """Also where nobody else counts the tokens in the cache."""
    hybrid = convert(family, replaced, others)
    tokens = torch.randint(2, 61, (2, 6), generator=torch.Generator().manual_seed(1))
    tokens[0, :2] = 0
    for mask in (torch.ones_like(tokens), (tokens != 0).long()):
        options = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False}
        assert torch.equal(hybrid.generate(tokens, **options), hybrid.generate(tokens, use_cache=False, **options))
    cache = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        for part in tokens.split((4, 1, 1), dim=1):
            hybrid(part, past_key_values=cache)
    assert cache.get_seq_length() == 6
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.get_seq_length() == 6


def test_tokens_alone_decide_where_nothing_mixes():
    hybrid = convert("llama", (0, 1, 2))
    tokens = torch.tensor([[5, 9, 5, 33, 5]])
    logits = hybrid(tokens).logits
    torch.testing.assert_close(logits[0, 0], logits[0, 4])
    assert not torch.allclose(logits[0, 0], logits[0, 1])
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    torch.testing.assert_close(hybrid(tokens, position_ids=positions).logits, logits)

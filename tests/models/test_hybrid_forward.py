"""The hybrid's forward: the teacher bit for bit, causal, packed = unpacked, padded = unpadded."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from hybridize.models import MixerLayer, attention_module, hybrid_model_class

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_all_attention_hybrid_is_the_teacher_bit_for_bit(
    family, make_teacher, make_hybrid, draw_tokens, implementation
):
    teacher = make_teacher(family, attn_implementation=implementation)
    hybrid = make_hybrid(teacher, [])
    tokens = draw_tokens(2, 17)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    assert torch.equal(hybrid(tokens).logits, teacher(tokens).logits)
    assert torch.equal(hybrid(tokens, attention_mask=mask).logits, teacher(tokens, attention_mask=mask).logits)


def test_only_replaced_layers_get_a_mixer(hybrid):
    kinds = [isinstance(attention_module(hybrid, layer), MixerLayer) for layer in range(4)]
    assert kinds == [True, False, True, False]
    assert "model.layers.2.self_attn.mixer.in_proj.weight" in hybrid.state_dict()


def test_logits_do_not_see_the_future(hybrid, draw_tokens):
    tokens = draw_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 9:] = draw_tokens(1, 7, seed=1)
    torch.testing.assert_close(hybrid(tokens).logits[:, :9], hybrid(changed).logits[:, :9], **TOLERANCE)
    assert not torch.allclose(hybrid(tokens).logits[:, 9:], hybrid(changed).logits[:, 9:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [None, False])
def test_packed_documents_equal_separate_ones(
    family, make_teacher, make_hybrid, draw_tokens, implementation, use_cache
):
    hybrid = make_hybrid(make_teacher(family, attn_implementation=implementation), [0, 2])
    lengths = (1, 7, 3, 9)
    tokens = draw_tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    options = {} if use_cache is None else {"use_cache": use_cache}
    packed = hybrid(tokens, position_ids=positions, **options).logits
    apart = [hybrid(document).logits for document in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), **TOLERANCE)


def test_packed_rows_may_differ_within_a_batch(hybrid, draw_tokens):
    tokens = draw_tokens(2, 10)
    positions = torch.stack([torch.arange(10), torch.cat([torch.arange(4), torch.arange(6)])])
    together = hybrid(tokens, position_ids=positions).logits
    alone = [hybrid(tokens[i : i + 1], position_ids=positions[i : i + 1]).logits for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), **TOLERANCE)


def test_packed_documents_with_a_cache_are_refused(hybrid, draw_tokens):
    positions = torch.cat([torch.arange(4), torch.arange(4)])[None]
    with pytest.raises(ValueError, match="use_cache: a hybrid cannot cache packed documents; pass use_cache=False"):
        hybrid(draw_tokens(1, 8), position_ids=positions, use_cache=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded(hybrid, draw_tokens, side):
    tokens = draw_tokens(1, 9)
    padding = torch.zeros(1, 4, dtype=torch.long)
    parts = (padding, tokens) if side == "left" else (tokens, padding)
    real = (torch.cat(parts, dim=1) != 0).long()
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    padded = hybrid(torch.cat(parts, dim=1), attention_mask=real, position_ids=positions).logits
    torch.testing.assert_close(padded[real.bool()][None], hybrid(tokens).logits, **TOLERANCE)


def test_cache_of_what_a_state_cannot_hold_is_refused(hybrid, draw_tokens):
    tokens = draw_tokens(2, 6)
    right = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    assert hybrid(tokens, attention_mask=right).past_key_values is None
    for options in ({"use_cache": True}, {"past_key_values": DynamicCache(config=hybrid.config)}):
        with pytest.raises(ValueError, match="cannot cache sequences that are not padded on the left"):
            hybrid(tokens, attention_mask=right, **options)
    cache = hybrid(tokens, attention_mask=right.flip(1), use_cache=True).past_key_values
    later = torch.cat([right.flip(1), right.flip(1)], dim=1)
    with pytest.raises(ValueError, match="cannot cache sequences with padding after their first token"):
        hybrid(tokens, attention_mask=later, past_key_values=cache)


def test_four_dimensional_mask_is_refused(hybrid, draw_tokens):
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask: a hybrid needs the 2-D padding mask.*position_ids"):
        hybrid(draw_tokens(1, 6), attention_mask=mask)


def test_base_model_alone_respects_documents_and_padding(hybrid, draw_tokens):
    tokens = draw_tokens(1, 10)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    packed = hybrid.model(tokens, None, positions, None, None, None).last_hidden_state
    torch.testing.assert_close(packed[:, 4:], hybrid.model(tokens[:, 4:]).last_hidden_state, **TOLERANCE)


def test_gradient_checkpointing_gives_the_same_gradients(hybrid, draw_tokens):
    hybrid.train()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    inputs = {"input_ids": draw_tokens(1, 12), "position_ids": positions, "labels": draw_tokens(1, 12)}

    def gradients():
        hybrid.zero_grad()
        hybrid(**inputs, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in hybrid.named_parameters()}

    plain = gradients()
    enable = getattr(hybrid, "activation_checkpointing_enable", None)  # not in every release supported
    (enable or hybrid.gradient_checkpointing_enable)()
    checkpointed = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
        assert gradient.abs().sum() > 0, name


def test_model_survives_pickle_and_deepcopy(hybrid, draw_tokens):
    tokens = draw_tokens(1, 6)
    expected = hybrid(tokens).logits
    for twin in (copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        assert torch.equal(twin(tokens).logits, expected)


def test_fresh_model_initialises_mixers_by_their_own_rule(hybrid):
    torch.manual_seed(3)
    fresh = hybrid_model_class(hybrid.config.model_type)(hybrid.config)
    mixer = attention_module(fresh, 0).mixer
    expected = torch.arange(1, 5, dtype=torch.float32).log().expand(mixer.A_log.shape)
    torch.testing.assert_close(mixer.A_log.detach(), expected)
    assert torch.equal(mixer.D.detach(), torch.ones_like(mixer.D))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias.detach())
    assert steps.min() >= 1e-3 * 0.99
    assert steps.max() <= 0.1 * 1.01


def test_packing_matters_to_the_result(hybrid, draw_tokens):
    """Guards the tests above against a hybrid that ignores its past altogether."""
    tokens = draw_tokens(1, 10)
    positions = torch.cat([torch.arange(5), torch.arange(5)])[None]
    packed, whole = hybrid(tokens, position_ids=positions).logits, hybrid(tokens).logits
    assert not torch.allclose(packed[:, 5:], whole[:, 5:], rtol=1e-2, atol=1e-2)

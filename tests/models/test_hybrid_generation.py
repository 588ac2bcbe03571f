"""Generation with the cache equals generation without it, alone equals in a padded batch."""

import pytest
import torch
from transformers import DynamicCache

LAYOUTS = [[], [0], [3], [0, 2], [1, 2, 3], [0, 1, 2, 3]]


@pytest.fixture(params=LAYOUTS, ids=str)
def any_hybrid(request, teacher, make_hybrid):
    return make_hybrid(teacher, request.param)


def test_cached_generation_equals_uncached(any_hybrid, draw_tokens):
    tokens = draw_tokens(2, 5)
    options = {"max_new_tokens": 10, "do_sample": False}
    cached = any_hybrid.generate(tokens, **options)
    assert torch.equal(cached, any_hybrid.generate(tokens, use_cache=False, **options))


def test_stepwise_logits_equal_full_logits(any_hybrid, draw_tokens):
    """In chunks of several sizes, past the sliding window, on one cache."""
    tokens = draw_tokens(2, 14)
    cache = DynamicCache(config=any_hybrid.config)
    with torch.no_grad():
        chunks = [any_hybrid(part, past_key_values=cache).logits for part in tokens.split((5, 1, 1, 3, 4), dim=1)]
        whole = any_hybrid(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 14


def test_left_padded_batch_equals_each_prompt_alone(any_hybrid, draw_tokens):
    prompts = [draw_tokens(1, 3), draw_tokens(1, 7, seed=1), draw_tokens(1, 5, seed=2)]
    padded = torch.cat([torch.nn.functional.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    options = {"max_new_tokens": 8, "do_sample": False}
    together = any_hybrid.generate(padded, attention_mask=(padded != 0).long(), **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = any_hybrid.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(row[-8:], alone[0, -8:])


def test_sampled_generation_equals_uncached_with_the_same_seed(hybrid, draw_tokens):
    tokens = draw_tokens(2, 5)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        runs.append(hybrid.generate(tokens, max_new_tokens=10, do_sample=True, use_cache=use_cache))
    assert torch.equal(*runs)


def test_beam_search_equals_uncached(hybrid, draw_tokens):
    tokens = draw_tokens(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    assert torch.equal(hybrid.generate(tokens, **options), hybrid.generate(tokens, use_cache=False, **options))


def test_static_cache_equals_dynamic(make_teacher, make_hybrid, draw_tokens):
    hybrid = make_hybrid(make_teacher("llama"), [0, 2])
    tokens = torch.nn.functional.pad(draw_tokens(2, 5), (2, 0))
    options = {"attention_mask": (tokens != 0).long(), "max_new_tokens": 6, "do_sample": False}
    static = hybrid.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(static, hybrid.generate(tokens, **options))


def test_generation_goes_on_from_a_cache(hybrid, draw_tokens):
    tokens = draw_tokens(1, 6)
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = hybrid.generate(tokens, max_new_tokens=5, **options)
    second = hybrid.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **options)
    assert torch.equal(second.sequences, hybrid.generate(tokens, max_new_tokens=10, **options).sequences)


def test_reset_cache_starts_afresh(hybrid, draw_tokens):
    cache = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        hybrid(draw_tokens(1, 6, seed=4), past_key_values=cache)
        cache.layers[0].reset()
        fresh = DynamicCache(config=hybrid.config)
        first = hybrid.model.layers[0].self_attn(torch.ones(1, 3, 32), past_key_values=cache)[0]
        expected = hybrid.model.layers[0].self_attn(torch.ones(1, 3, 32), past_key_values=fresh)[0]
    torch.testing.assert_close(first, expected)


def test_cache_of_the_wrong_kind_is_refused(hybrid, draw_tokens):
    with pytest.raises(ValueError, match=r"layer 0 is a mixer, but the cache.*DynamicCache\(config=model.config\)"):
        hybrid(draw_tokens(1, 4), past_key_values=DynamicCache())


def test_a_cache_of_other_rows_is_refused_and_left_as_it_is(make_teacher, make_hybrid, draw_tokens):
    hybrid = make_hybrid(make_teacher("llama"), [0, 2])
    cache = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        hybrid(draw_tokens(4, 5), past_key_values=cache)
        before = cache.layers[0].recurrent_states[0].clone()
        with pytest.raises(ValueError, match=r"past_key_values: layer 0 holds 4 rows, the input has 2; reorder or"):
            hybrid(draw_tokens(2, 1), past_key_values=cache)
    assert torch.equal(cache.layers[0].recurrent_states[0], before)


def test_assisted_generation_is_refused(hybrid, draw_tokens):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        hybrid.generate(draw_tokens(1, 4), max_new_tokens=4, prompt_lookup_num_tokens=2)

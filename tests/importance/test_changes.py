"""A layer left out or with a short window, in every family: what is seen, and that generation still works."""

from contextlib import ExitStack

import pytest
import torch
from ranking_example import build_teacher as build_plain

from hybridize.importance.changes import left_out, windowed
from hybridize.importance.decoder import decoder_layers
from hybridize.models import FAMILIES, attention_module, find_family
from tiny_families import NUM_LAYERS, build_teacher

DOCUMENTS = (11, 7)
POSITIONS = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
WINDOW = 3


def draw(*shape):
    return torch.randint(2, 61, shape, generator=torch.Generator().manual_seed(0))


def final(model, tokens, positions=POSITIONS):
    with torch.no_grad():
        return model.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_left_out_mixer_adds_nothing(model_type):
    model, tokens = build_teacher(model_type), draw(1, sum(DOCUMENTS))
    whole = final(model, tokens)
    with left_out(model, 1, "mixer"):
        without = final(model, tokens)
    assert torch.equal(final(model, tokens), whole)
    output = attention_module(model, 1).get_submodule(find_family(model_type).o)
    for parameter in output.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(without, final(model, tokens), rtol=0, atol=0)
    assert not torch.allclose(without, whole, atol=1e-3)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_left_out_block_is_a_model_with_a_layer_less(model_type):
    model, tokens = build_teacher(model_type), draw(1, sum(DOCUMENTS))
    last = NUM_LAYERS - 1
    with left_out(model, last, "block"):
        without = final(model, tokens)
    decoder_layers(model)[last] = torch.nn.Identity()
    decoder_layers(model)[last].forward = lambda hidden, **_: hidden
    assert torch.equal(without, final(model, tokens))


@pytest.mark.parametrize("identity", ["mixer", "block"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_generation_with_a_layer_left_out_needs_no_other_cache(model_type, identity):
    """Layer 0 is the one that caches are asked for their length; the others bound what slides."""
    model = build_teacher(model_type)
    tokens, mask = draw(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0  # a shorter prompt, padded on the left
    for layer in (0, 1):
        with left_out(model, layer, identity):
            options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
            cached = model.generate(tokens, **options)
            assert torch.equal(cached, model.generate(tokens, **options, use_cache=False))
        whole = model.generate(tokens, **options)
        assert cached.shape == whole.shape
        assert not torch.equal(cached, whole)


@pytest.mark.parametrize("attention", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_window_shows_the_last_tokens_of_the_document_and_no_more(model_type, attention):
    model, tokens = build_teacher(model_type, attn_implementation=attention), draw(1, sum(DOCUMENTS))
    layer, length = 1, sum(DOCUMENTS)

    with ExitStack() as changed:
        for other in range(NUM_LAYERS):
            if other != layer:
                changed.enter_context(left_out(model, other, "mixer"))
        changed.enter_context(windowed(model, layer, WINDOW))
        before = final(model, tokens)
        for place in (0, 4, DOCUMENTS[0] - 1, DOCUMENTS[0], length - 2):
            other = tokens.clone()
            other[0, place] = 2 + (other[0, place] - 1) % 59
            reached = (final(model, other) - before).abs().amax(-1)[0] > 1e-6
            end = DOCUMENTS[0] if place < DOCUMENTS[0] else length
            expected = torch.zeros(length, dtype=torch.bool)
            expected[place : min(place + WINDOW, end)] = True
            assert torch.equal(reached, expected), place


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", [POSITIONS, torch.arange(18)[None]], ids=["packed", "one document"])
def test_a_window_in_every_layer_is_a_model_with_a_sliding_window(attention, positions):
    full = build_plain("mistral", sliding_window=None, attn_implementation=attention)
    sliding = build_plain("mistral", sliding_window=WINDOW, attn_implementation=attention)
    tokens = draw(1, 18)
    with ExitStack() as changed:
        for layer in range(NUM_LAYERS):
            changed.enter_context(windowed(full, layer, WINDOW))
        narrow = final(full, tokens, positions)
    torch.testing.assert_close(narrow, final(sliding, tokens, positions), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(narrow, final(full, tokens, positions), atol=1e-3)


def test_a_window_as_long_as_the_rows_changes_no_bit():
    model, tokens = build_plain("llama"), draw(1, 18)
    whole = final(model, tokens)
    with windowed(model, 0, 18):
        assert torch.equal(final(model, tokens), whole)
    with windowed(model, 0, 10):
        assert not torch.equal(final(model, tokens), whole)
    assert torch.equal(final(model, tokens), whole)


def test_attention_that_takes_no_mask_is_refused():
    model = build_plain("llama")
    model.config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(ValueError, match=r"window: .*'flash_attention_2'.* attn_implementation sdpa or eager"),
        windowed(model, 0, 4),
    ):
        pass

"""The cache with room to grow holds what transformers' holds, and moves it less."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MambaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hybridize.models.growing_cache import GrowingLayer, make_cache, rows_can_leave


def small_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def states(num_tokens: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, num_tokens, 4), torch.randn(rows, 2, num_tokens, 4)


def test_generation_has_the_bits_of_transformers_own_cache() -> None:
    model = small_model()
    input_ids = torch.randint(1, 64, (3, 9))
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    logits = []
    for cache in (DynamicCache(config=model.config), make_cache(model.config)):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=100,
            do_sample=False,
            past_key_values=cache,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        logits.append(torch.stack(output.logits))
    assert torch.equal(*logits)


def test_a_growing_layer_holds_what_a_dynamic_one_does_whatever_is_done_to_it() -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    rows = 3

    def add(num_tokens: int) -> None:
        new = states(num_tokens, rows)
        for got, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(got, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()

    for num_tokens in (5, 1, 200, 1, 1):
        add(num_tokens)
    for layer in (ours, theirs):
        layer.crop(-7)
    add(1)
    for layer in (ours, theirs):
        layer.reorder_cache(torch.tensor([2, 0, 1]))
    add(2)
    rows = 2
    for layer in (ours, theirs):
        layer.batch_select_indices(torch.tensor([0, 2]))
    add(1)
    add(1)


def test_what_is_held_stays_where_it_is_while_there_is_room() -> None:
    layer = GrowingLayer()
    layer.update(*states(5))
    places = set()
    for _ in range(200):
        keys, _ = layer.update(*states(1))
        places.add(keys.data_ptr())
    assert len(places) == 4  # room for 69, 134, 202 and 304 tokens


@pytest.mark.parametrize("order", [[0, 3, 2], [4, 1], [0, 1, 2], [1, 0, 4, 3, 2], [2]])
def test_rows_leave_without_moving_those_that_stay(order: list[int]) -> None:
    ours, theirs = GrowingLayer(12), DynamicLayer()
    for num_tokens in (5, 1):
        new = states(num_tokens, rows=5)
        ours.update(*new)
        theirs.update(*new)
    place = ours.keys.data_ptr()
    for layer in (ours, theirs):
        layer.reorder_cache(torch.tensor(order))
    new = states(1, len(order))
    for got, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
        assert torch.equal(got, expected)
    assert ours.keys.data_ptr() == place


def test_more_rows_than_there_were_get_a_room_of_their_own() -> None:
    ours, theirs = GrowingLayer(12), DynamicLayer()
    for rows, order in ((2, [0, 0, 1, 1]), (4, [3, 1])):
        new = states(3, rows)
        for layer in (ours, theirs):
            layer.update(*new)
            layer.reorder_cache(torch.tensor(order))
    for got, expected in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        assert torch.equal(got, expected)


def test_room_for_a_known_length_is_set_aside_once_and_grows_beyond() -> None:
    config = small_model().config
    cache = make_cache(config, 105)
    assert cache is not None
    layer = cache.layers[1]
    layer.update(*states(5))
    places = {layer.update(*states(1))[0].data_ptr() for _ in range(100)}
    assert len(places) == 1
    assert layer.keys.untyped_storage().nbytes() == 4 * 3 * 2 * 105 * 4
    keys, _ = layer.update(*states(1))
    assert keys.shape[-2] == 106
    assert keys.data_ptr() not in places


def test_reset_gives_the_room_back() -> None:
    layer = GrowingLayer()
    layer.update(*states(5))
    layer.reset()
    assert layer._key_room is None
    assert layer._value_room is None
    assert layer.get_seq_length() == 0
    new = states(4)
    assert all(torch.equal(got, expected) for got, expected in zip(layer.update(*new), new, strict=True))


@pytest.mark.parametrize("sliding_window", [None, 16])
def test_only_layers_that_keep_all_tokens_get_room(sliding_window: int | None) -> None:
    cache = make_cache(MistralConfig(num_hidden_layers=2, sliding_window=sliding_window))
    assert cache is not None
    kind = GrowingLayer if sliding_window is None else DynamicSlidingWindowLayer
    assert [type(layer) for layer in cache.layers] == [kind, kind]
    assert rows_can_leave(cache)
    cache.layers[1] = type("Unknown", (kind,), {})(16)
    assert not rows_can_leave(cache)


def test_a_model_without_attention_makes_its_own_cache() -> None:
    assert make_cache(MambaConfig(num_hidden_layers=2)) is None


def test_windows_keep_what_they_reach_and_give_the_same_answers(tiny_teacher: Any) -> None:
    from hybridize.models import load_teacher
    from hybridize.spec import LayoutSpec, SlidingWindowSpec
    from hybridize.transfer import convert

    teacher = load_teacher(str(tiny_teacher)).float()
    layout = LayoutSpec.replace(teacher.config.num_hidden_layers, (1, 2), SlidingWindowSpec(window=5))
    model = convert(teacher, layout)[0].eval()
    input_ids = torch.randint(4, teacher.config.vocab_size, (2, 11))
    answers = []
    for cache in (DynamicCache(config=model.config), make_cache(model.config, 40)):
        answers.append(
            model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=20,
                do_sample=False,
                past_key_values=cache,
                pad_token_id=0,
                eos_token_id=None,
            )
        )
        held = [layer.keys.shape[-2] for layer in cache.layers]
        assert held[1] == held[2] == 4, "what the next token's window reaches of those before"
        assert held[0] == held[3] == 30
    assert torch.equal(*answers)

"""Hybrids with sliding windows and identities: the teacher's attention, but for what it sees, in every respect."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from hybridize.models import (
    attention_module,
    cache_bytes,
    convert_model,
    layout_of,
    load_model,
    save_hybrid,
    sequence_bytes,
    swap_layer,
    window,
)
from hybridize.spec import AttentionSpec, IdentitySpec, LayoutSpec, Mamba1Spec, SlidingWindowSpec
from hybridize.transfer import convert, replace_layer

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def windowed(teacher, layers, size=4, sink=False, **options):
    layout = LayoutSpec.replace(teacher.config.num_hidden_layers, layers, SlidingWindowSpec(window=size, sink=sink))
    hybrid = convert_model(teacher, layout, **options)
    for layer in layers if sink else ():
        own = attention_module(hybrid, layer).sink
        own.data.copy_(torch.randn(own.shape, generator=torch.Generator().manual_seed(layer)) * 2)
    return hybrid


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("own", "size", "seen"), [(None, 3, 3), (6, 3, 3), (3, 6, 3)])
def test_window_is_the_one_that_transformers_gives_mistral(make_teacher, draw_tokens, implementation, own, size, seen):
    """Where the teacher has a window of its own, the smaller one holds."""
    tokens = draw_tokens(2, 17)
    teacher = make_teacher("mistral", sliding_window=own, attn_implementation=implementation)
    reference = make_teacher("mistral", sliding_window=seen, attn_implementation=implementation)
    hybrid = windowed(teacher, (0, 1, 2, 3), size)
    torch.testing.assert_close(hybrid(tokens).logits, reference(tokens).logits, **TOLERANCE)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(hybrid.generate(tokens, **options), reference.generate(tokens, **options))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_window_beyond_the_sequence_is_the_teacher(family, make_teacher, draw_tokens, implementation):
    teacher = make_teacher(family, attn_implementation=implementation)
    tokens = draw_tokens(2, 17)
    hybrid = windowed(teacher, (0, 1, 2, 3), size=100)
    torch.testing.assert_close(hybrid(tokens).logits, teacher(tokens).logits, **TOLERANCE)


def test_sink_takes_weight_from_what_is_read(make_teacher, draw_tokens):
    teacher, tokens = make_teacher("llama"), draw_tokens(1, 9)
    hybrid, without = windowed(teacher, (2,), sink=True), windowed(teacher, (2,))
    sink = attention_module(hybrid, 2).sink
    assert (sink.dtype, tuple(sink.shape), sink.requires_grad) == (torch.float32, (4,), True)
    sink.data.fill_(-100.0)
    torch.testing.assert_close(hybrid(tokens).logits, without(tokens).logits)
    sink.data.zero_()
    assert not torch.allclose(hybrid(tokens).logits, without(tokens).logits, rtol=1e-2, atol=1e-2)
    hybrid(tokens, labels=tokens).loss.backward()
    assert sink.grad.abs().min() > 0


def test_layers_beside_a_window_are_the_teachers_bit_for_bit(family, make_teacher, draw_tokens):
    """Their own attention sees what it saw, whatever mask and cache its neighbours have."""
    teacher, tokens = make_teacher(family), draw_tokens(2, 17)
    hybrid = windowed(teacher, (1, 3), size=2)
    seen = {}
    for name, model in (("teacher", teacher), ("hybrid", hybrid)):
        attention_module(model, 0).register_forward_hook(lambda *a, name=name: seen.setdefault(name, a[2][0]))
        model(tokens)
    assert torch.equal(seen["teacher"], seen["hybrid"])
    for layer in (0, 2):
        assert attention_module(hybrid, layer).config._attn_implementation == teacher.config._attn_implementation


def test_module_keeps_class_tensors_and_settings(family, make_teacher):
    teacher = make_teacher(family)
    hybrid = windowed(teacher, (2,), sink=True)
    ours, own = attention_module(hybrid, 2), attention_module(teacher, 2)
    assert type(ours) is type(own)
    assert set(ours.state_dict()) == {*own.state_dict(), "sink"}
    for name, tensor in own.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert ours.scaling == own.scaling
    hybrid.set_attn_implementation("eager")
    assert ours.config._attn_implementation == "hybridize_window"
    assert attention_module(hybrid, 1).config._attn_implementation == "eager"
    assert own.config._attn_implementation == "sdpa"
    assert not hasattr(own, "sink")


LAYOUTS = {
    "window first": ("s", "a", "s", "a"),
    "windows only": ("s", "s", "s", "s"),
    "sinks": ("a", "S", "S", "a"),
    "mixed": ("S", "i", "m", "s"),
    "identity first": ("i", "s", "a", "m"),
}
SPECS = {
    "a": AttentionSpec(),
    "s": SlidingWindowSpec(window=4),
    "S": SlidingWindowSpec(window=3, sink=True),
    "i": IdentitySpec(),
    "m": Mamba1Spec(state_size=4),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def any_hybrid(request, teacher):
    torch.manual_seed(1)
    hybrid = convert_model(teacher, LayoutSpec(layers=tuple(SPECS[kind] for kind in request.param)))
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if name.endswith(".sink"):
                parameter.normal_(0.0, 2.0)
    return hybrid


def test_cached_generation_equals_uncached(any_hybrid, draw_tokens):
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 9, "do_sample": False}
        cached = any_hybrid.generate(draw_tokens(2, 5), **options)
        assert torch.equal(cached, any_hybrid.generate(draw_tokens(2, 5), use_cache=False, **options))


def test_stepwise_logits_equal_full_logits(any_hybrid, draw_tokens):
    tokens = draw_tokens(2, 14)
    cache = DynamicCache(config=any_hybrid.config)
    with torch.no_grad():
        parts = [any_hybrid(part, past_key_values=cache).logits for part in tokens.split((5, 1, 1, 3, 4), dim=1)]
        whole = any_hybrid(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 14


def test_left_padded_batch_equals_each_prompt_alone(any_hybrid, draw_tokens):
    prompts = [draw_tokens(1, 3), draw_tokens(1, 7, seed=1), draw_tokens(1, 5, seed=2)]
    padded = torch.cat([torch.nn.functional.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    options = {"max_new_tokens": 8, "do_sample": False}
    together = any_hybrid.generate(padded, attention_mask=(padded != 0).long(), **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = any_hybrid.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(row[-8:], alone[0, -8:])


def test_packed_documents_equal_separate_ones(any_hybrid, draw_tokens):
    lengths = (1, 7, 3, 9)
    tokens = draw_tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = any_hybrid(tokens, position_ids=positions).logits
    apart = [any_hybrid(document).logits for document in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), **TOLERANCE)


def test_gradient_checkpointing_gives_the_same_gradients(any_hybrid, draw_tokens, monkeypatch):
    """With one recomputation within the other: a window's blocks are computed again in backward too."""
    monkeypatch.setattr(window, "_BLOCK", 5)
    any_hybrid.train()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    inputs = {"input_ids": draw_tokens(1, 12), "position_ids": positions, "labels": draw_tokens(1, 12)}

    def gradients():
        any_hybrid.zero_grad()
        any_hybrid(**inputs, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in any_hybrid.named_parameters()}

    plain = gradients()
    enable = getattr(any_hybrid, "activation_checkpointing_enable", None)  # not in every release supported
    (enable or any_hybrid.gradient_checkpointing_enable)()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
        before_identity = any(
            spec.type == "identity" and name.endswith(f"layers.{layer}.input_layernorm.weight")
            for layer, spec in enumerate(any_hybrid.config.layout.layers)
        )
        assert (gradient.abs().sum() > 0) != before_identity, name


def test_static_cache_equals_dynamic(make_teacher, draw_tokens):
    """Also one that slides, before and after it is full."""
    tokens = torch.nn.functional.pad(draw_tokens(2, 5), (2, 0))
    options = {"attention_mask": (tokens != 0).long(), "max_new_tokens": 9, "do_sample": False}
    for teacher in (make_teacher("llama"), make_teacher("mistral"), make_teacher("mistral", sliding_window=9)):
        for size, sink in ((4, False), (8, False), (4, True)):
            hybrid = windowed(teacher, (0, 2), size, sink)
            static = hybrid.generate(tokens, cache_implementation="static", **options)
            assert torch.equal(static, hybrid.generate(tokens, **options))


def test_cache_holds_no_more_than_the_window(any_hybrid, draw_tokens):
    cache = DynamicCache(config=any_hybrid.config)
    tokens = draw_tokens(1, 40)
    with torch.no_grad():
        for part in tokens.split((33, 1, 1, 1, 4), dim=1):
            any_hybrid(part, past_key_values=cache)
            for spec, layer in zip(any_hybrid.config.layout.layers, cache.layers, strict=True):
                if isinstance(spec, SlidingWindowSpec):
                    assert layer.keys.shape[-2] == layer.values.shape[-2] == spec.window - 1
                    assert layer.keys.untyped_storage().nbytes() <= 4 * layer.keys.nbytes
                    assert layer.get_seq_length() == cache.get_seq_length()
    for spec, layer in zip(any_hybrid.config.layout.layers, cache.layers, strict=True):
        if isinstance(spec, SlidingWindowSpec):
            with pytest.raises(ValueError, match="cannot be rolled back by 2; start from an empty cache"):
                layer.crop(-2)


def test_window_over_a_wider_one_answers_for_it(make_teacher, draw_tokens):
    """The layers that slide make their mask by the first of them, which is ours."""
    hybrid = windowed(make_teacher("mistral", sliding_window=6), (0, 2), size=3)
    cache, reference = DynamicCache(config=hybrid.config), DynamicSlidingWindowLayer(6)
    with torch.no_grad():
        for part in draw_tokens(1, 14).split((4, 1, 5, 4), dim=1):
            hybrid(part, past_key_values=cache)
            states = torch.zeros(1, 2, part.shape[1], 8)
            reference.update(states, states)
            assert cache.layers[0].get_mask_sizes(2) == reference.get_mask_sizes(2)
            assert cache.is_sliding == [True] * 4


def test_cache_of_windows_can_be_reset(make_teacher, draw_tokens):
    for family in ("llama", "mistral"):
        hybrid = windowed(make_teacher(family), (0, 1, 2, 3), size=3)
        cache = DynamicCache(config=hybrid.config)
        first = hybrid(draw_tokens(2, 9), past_key_values=cache).logits
        kept = list(cache.layers)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(hybrid(draw_tokens(2, 9), past_key_values=cache).logits, first)
        assert all(layer is same for layer, same in zip(cache.layers, kept, strict=True))
        assert cache.get_seq_length() == 9


def test_bytes_of_a_window_do_not_grow(make_teacher):
    teacher = make_teacher("llama")
    token = 2 * 2 * 8 * 2
    for layers, size in (((1,), 5), ((0, 1, 2, 3), 7)):
        config = windowed(teacher, layers, size).config
        assert tuple(cache_bytes(config, torch.bfloat16)) == ((4 - len(layers)) * token, len(layers) * size * token)
        for length in (3, 100):
            bounded, whole = len(layers) * min(length, size), (4 - len(layers)) * length
            assert sequence_bytes(config, torch.bfloat16, length) == (bounded + whole) * token
    narrow = windowed(make_teacher("mistral", sliding_window=6), (1,), size=9).config
    assert cache_bytes(narrow, torch.bfloat16).state == 6 * token
    layout = LayoutSpec(layers=(IdentitySpec(),) * 4)
    assert tuple(cache_bytes(convert_model(teacher, layout).config, torch.bfloat16)) == (0, 0)


@pytest.mark.parametrize("loader", [load_model, AutoModelForCausalLM.from_pretrained])
def test_saved_hybrid_comes_back_bit_for_bit(any_hybrid, tmp_path, draw_tokens, loader):
    save_hybrid(any_hybrid, None, tmp_path / "out")
    loaded = loader(tmp_path / "out").eval()
    before, after = any_hybrid.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.config.layout == any_hybrid.config.layout
    assert torch.equal(loaded(draw_tokens(2, 9)).logits, any_hybrid(draw_tokens(2, 9)).logits)


def test_copies_compute_the_same(any_hybrid, draw_tokens):
    expected = any_hybrid(draw_tokens(1, 9)).logits
    for twin in (copy.deepcopy(any_hybrid), pickle.loads(pickle.dumps(any_hybrid))):
        assert torch.equal(twin(draw_tokens(1, 9)).logits, expected)
        for layer, spec in enumerate(any_hybrid.config.layout.layers):
            if isinstance(spec, SlidingWindowSpec):
                module = attention_module(twin, layer)
                assert module.config.whole is twin.config
                assert module.config._attn_implementation == "hybridize_window"


def test_sink_stays_fp32_in_half_precision(make_teacher, tmp_path, draw_tokens):
    hybrid = windowed(make_teacher("llama").to(torch.bfloat16), (1,), sink=True)
    save_hybrid(hybrid, None, tmp_path / "bf16")
    save_hybrid(windowed(make_teacher("llama"), (1,), sink=True), None, tmp_path / "fp32")
    for model in (hybrid, load_model(tmp_path / "bf16"), load_model(tmp_path / "fp32", dtype=torch.bfloat16)):
        own = attention_module(model, 1)
        assert (own.sink.dtype, own.q_proj.weight.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(own.sink, attention_module(hybrid, 1).sink)
        assert model(draw_tokens(1, 9)).logits.dtype == torch.bfloat16


def test_missing_sink_is_named_or_0(make_teacher, tmp_path):
    folder = save_hybrid(windowed(make_teacher("llama"), (1,), sink=True), None, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.sink"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.self_attn\.sink"):
        load_model(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(attention_module(plain, 1).sink, torch.zeros(4))


def test_layer_swapped_to_a_window_and_back_is_the_teacher(teacher, draw_tokens):
    tokens = draw_tokens(2, 9)
    hybrid = convert_model(teacher, LayoutSpec(layers=(AttentionSpec(),) * 4), share=True)
    old = swap_layer(hybrid, 1, SlidingWindowSpec(window=2, sink=True))
    assert str(layout_of(hybrid.config)) == "asaa"
    own = attention_module(hybrid, 1)
    assert own is not old
    assert own.q_proj.weight is old.q_proj.weight
    expected = convert_model(teacher, layout_of(hybrid.config))
    assert torch.equal(hybrid(tokens).logits, expected(tokens).logits)
    assert not torch.allclose(hybrid(tokens).logits, teacher(tokens).logits)
    assert swap_layer(hybrid, 1, IdentitySpec()) is own
    assert torch.equal(hybrid.generate(tokens, max_new_tokens=3), hybrid.generate(tokens, max_new_tokens=3))
    with pytest.raises(ValueError, match="a sliding window goes over attention, but the layer is a identity"):
        swap_layer(hybrid, 1, SlidingWindowSpec(window=2))
    swap_layer(hybrid, 1, Mamba1Spec(state_size=4))
    swap_layer(hybrid, 1, own)
    assert torch.equal(hybrid(tokens).logits, expected(tokens).logits)
    swap_layer(hybrid, 1, old)
    assert torch.equal(hybrid(tokens).logits, teacher(tokens).logits)
    assert old.config._attn_implementation == "sdpa"


def test_swapped_mixers_have_the_layers_dtype(make_teacher):
    """Whatever was there: fp32 decays of a mixer, or no parameter at all."""
    hybrid = convert_model(make_teacher("llama").to(torch.bfloat16), LayoutSpec(layers=(AttentionSpec(),) * 4))
    for spec in (SPECS["m"], SPECS["i"], SPECS["m"], Mamba1Spec(state_size=8)):
        swap_layer(hybrid, 1, spec)
        dtypes = {name: tensor.dtype for name, tensor in attention_module(hybrid, 1).state_dict().items()}
        fp32 = {name.removeprefix("mixer.") for name, dtype in dtypes.items() if dtype == torch.float32}
        assert fp32 == ({"A_log", "D", "dt_proj.bias"} if spec.type == "mamba1" else set())


def test_conversion_accounts_for_every_tensor_and_explains(teacher):
    layout = LayoutSpec(layers=(SPECS["S"], SPECS["s"], SPECS["i"], SPECS["m"]))
    hybrid, plan = convert(teacher, layout)
    before, after = teacher.state_dict(), hybrid.state_dict()
    for layer in (0, 1):
        names = [name for name in before if name.startswith(f"model.layers.{layer}.")]
        assert all(torch.equal(before[name], after[name]) for name in names)
    assert torch.equal(after["model.layers.0.self_attn.sink"], torch.zeros(4))
    assert "model.layers.1.self_attn.sink" not in after
    assert not [name for name in after if name.startswith("model.layers.2.self_attn.")]
    lines = str(plan).splitlines()
    assert "layer 0: becomes sliding_window, 9 tensors untouched" in lines
    assert "  sink [4] = set: 0, as much as a key that scores 0" in lines
    assert lines.count("  q_proj.weight: stays the teacher's") == 2
    assert "layer 2: becomes identity, 5 tensors untouched" in lines
    assert "  q_proj.weight: dropped, since an identity adds nothing and reads nothing" in lines
    with pytest.raises(ValueError, match=r"unmentioned: \['model.layers.1.self_attn.sink'\]"):
        plan.check(before, [*after, "model.layers.1.self_attn.sink"])


def test_conversion_goes_on_from_a_hybrid_with_windows(teacher, draw_tokens):
    first, _ = convert(teacher, LayoutSpec.replace(4, [1], SPECS["S"]))
    attention_module(first, 1).sink.data.fill_(0.5)
    second, plan = convert(first, layout_of(first.config).with_replaced([2], SPECS["m"]))
    assert torch.equal(attention_module(second, 1).sink, torch.full((4,), 0.5))
    assert "layer 1: stays sliding_window, 10 tensors untouched" in str(plan)
    with pytest.raises(ValueError, match=r"layout\[1\]: the model's layer is a sliding_window already"):
        convert(first, LayoutSpec.replace(4, [1], SPECS["m"]))


def test_layer_replaced_in_place_equals_the_conversion(teacher, draw_tokens):
    tokens = draw_tokens(2, 9)
    for spec in (SPECS["S"], SPECS["s"], SPECS["i"]):
        hybrid = convert_model(teacher, LayoutSpec(layers=(AttentionSpec(),) * 4), share=True)
        old = replace_layer(hybrid, 2, spec)
        expected, _ = convert(teacher, LayoutSpec.replace(4, [2], spec))
        assert torch.equal(hybrid(tokens).logits, expected(tokens).logits)
        swap_layer(hybrid, 2, old)
        assert torch.equal(hybrid(tokens).logits, teacher(tokens).logits)

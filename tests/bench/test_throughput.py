"""Throughput: exactly the tokens asked for are generated, timed and counted, whatever ends a sequence."""

import itertools

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from hybridize.bench import measure_throughput, throughput
from hybridize.models import cache_bytes, load_teacher
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.transfer import convert

OPTIONS = {"batch_size": 3, "prompt_tokens": 5, "new_tokens": 12, "repeats": 2}


@pytest.fixture(params=["teacher", "hybrid", "mixers only"])
def model(request, tiny_teacher):
    teacher = load_teacher(tiny_teacher)
    if request.param == "teacher":
        return teacher
    layers = range(4) if request.param == "mixers only" else (1, 2)
    return convert(teacher, LayoutSpec.replace(4, layers, Mamba1Spec()))[0]


@pytest.fixture
def outputs(model, monkeypatch):
    """What each call of `generate` returns."""
    kept = []
    generate = model.generate

    def watched(**options):
        kept.append(generate(**options))
        return kept[-1]

    monkeypatch.setattr(model, "generate", watched)
    return kept


def test_every_run_generates_what_was_asked_for(model, outputs):
    progress = []
    measured = measure_throughput(model, **OPTIONS, on_progress=lambda *done: progress.append(done))
    assert [tuple(output.shape) for output in outputs] == [(3, 5 + 12)] * 3  # one of them does not count
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert len({tuple(row) for row in outputs[0][:, :5].tolist()}) == 3  # prompts differ
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert len(measured["seconds_repeats"]) == len(measured["tokens_per_second_repeats"]) == 2
    assert (measured["device"], measured["dtype"]) == ("cpu", "float32")
    assert {name: measured[name] for name in ("batch_size", "prompt_tokens", "new_tokens")} == {
        "batch_size": 3,
        "prompt_tokens": 5,
        "new_tokens": 12,
    }


def test_rates_are_tokens_over_seconds_and_the_median_counts(model, monkeypatch):
    """By a clock whose runs take 100 (not counted), 2, 8 and 4 seconds."""
    ticks = itertools.accumulate([0, 100, 0, 2, 0, 8, 0, 4])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(ticks))
    measured = measure_throughput(model, **OPTIONS | {"repeats": 3})
    assert measured["seconds_repeats"] == [2, 8, 4]
    assert measured["tokens_per_second_repeats"] == [36 / 2, 36 / 8, 36 / 4]
    assert measured["tokens_per_second"] == 36 / 4
    assert measured["tokens_per_second_min"] == 36 / 8
    assert measured["tokens_per_second_max"] == 36 / 2


def test_the_end_of_sequence_ends_nothing(model, outputs):
    measure_throughput(model, **OPTIONS)
    free = outputs[0]
    model.generation_config.eos_token_id = model.config.eos_token_id = sorted(set(free[:, 6].tolist()))
    short = model.generate(
        input_ids=free[:, :5], attention_mask=torch.ones(3, 5), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert short.shape[1] <= 7  # left to itself, it ends with its second token
    del outputs[:]
    settings = model.generation_config
    measure_throughput(model, **OPTIONS)
    assert all(torch.equal(output, free) for output in outputs)
    assert model.generation_config is settings


def test_a_models_own_settings_do_not_change_what_is_measured(model, outputs):
    model.generation_config.update(do_sample=True, temperature=0.7, num_beams=2, repetition_penalty=3.0)
    model.train()
    measure_throughput(model, **OPTIONS)
    expected = model.eval()(outputs[0][:, :-1], use_cache=False).logits[:, 4:].argmax(-1)
    assert torch.equal(outputs[0][:, 5:], expected)
    assert model.generation_config.num_beams == 2


def test_the_mode_is_left_as_it_was(model):
    model.train()
    measure_throughput(model, batch_size=1, prompt_tokens=2, new_tokens=1, repeats=1)
    assert model.training


def test_memory_of_a_sequence_is_that_of_its_cache(model):
    measured = measure_throughput(model, **OPTIONS)
    per_token, state = cache_bytes(model.config, torch.float32)
    assert measured["kv_bytes_per_token"] == per_token
    assert measured["state_bytes_per_sequence"] == state
    assert measured["cache_bytes_per_sequence"] == 17 * per_token + state


@pytest.mark.parametrize("replaced", [(), (1,), (1, 2)])
def test_a_sliding_window_bounds_the_cache_of_the_layers_that_have_one(replaced):
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    config = Gemma2Config(vocab_size=61, num_key_value_heads=1, head_dim=16, sliding_window=9, pad_token_id=0, **sizes)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    model = convert(Gemma2ForCausalLM(config).eval(), LayoutSpec.replace(4, replaced, Mamba1Spec(state_size=8)))[0]
    measured = measure_throughput(model, **OPTIONS)
    num_full, num_sliding = 2 - (1 in replaced), 2 - (2 in replaced)
    one_layer = 2 * 16 * 4
    assert measured["kv_bytes_per_token"] == (num_full + num_sliding) * one_layer
    kv = (num_full * 17 + num_sliding * 9) * one_layer
    assert measured["cache_bytes_per_sequence"] == kv + measured["state_bytes_per_sequence"]


@pytest.mark.parametrize("name", OPTIONS)
def test_options_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"{name}: 0 is out of range; use at least 1"):
        measure_throughput(None, **OPTIONS | {name: 0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_named(model):
    measured = measure_throughput(model.to("cuda", torch.bfloat16), **OPTIONS)
    assert measured["device"] == torch.cuda.get_device_name()

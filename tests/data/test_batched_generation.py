"""Batched generation: an answer depends on its own numbers alone, and ends at its own limit."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer
from vllm_example import FakeVllm

from hybridize.data.chat import render_prompt
from hybridize.data.generation import (
    GenerationSettings,
    Request,
    TransformersEngine,
    VllmEngine,
    answer,
    generate_texts,
    make_requests,
)
from hybridize.data.sampling import end_tokens_of
from hybridize.data.world import TASKS, draw_problem

PROMPTS = [draw_problem(task, 1, "train", i).messages[:1] for i in range(2) for task in TASKS]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tiny_teacher):
    """A random model that many tokens stop, so that answers have many lengths."""
    from hybridize.models import load_teacher

    model = load_teacher(tiny_teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(100, 140)]
    return model, tokenizer


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_how_batches_are_cut(tiny, temperature):
    settings = GenerationSettings(20, temperature, 0.95, samples=2 if temperature else 1, seed=3)
    answers = [generate_texts(*tiny, PROMPTS, settings, batch_size) for batch_size in (1, 5, 99)]
    assert answers[0] == answers[1] == answers[2]
    flat = [generated for samples in answers[0] for generated in samples]
    assert {generated.ended for generated in flat} == {True, False}
    for generated in flat:
        assert generated.num_tokens == 20 if not generated.ended else generated.num_tokens < 20
    if temperature:
        assert any(first != second for first, second in answers[0])


def test_more_samples_leave_the_first_ones_as_they_are(tiny):
    two, three, other = (
        generate_texts(*tiny, PROMPTS, GenerationSettings(12, 1.0, samples=n, seed=s))
        for n, s in ((2, 0), (3, 0), (2, 1))
    )
    assert [samples[:2] for samples in three] == two
    assert other != two


def test_greedy_is_what_transformers_gives_alone(tiny):
    model, tokenizer = tiny
    for messages in PROMPTS[:3]:
        ids = torch.tensor([render_prompt(tokenizer, messages)])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        expected = [token for token in expected[0, ids.shape[1] :].tolist() if token not in end_tokens_of(*tiny)]
        [[generated]] = generate_texts(model, tokenizer, [messages], GenerationSettings(20))
        assert generated.text == tokenizer.decode(expected)
        assert generated.num_tokens == len(expected)


def test_an_answer_is_cut_at_its_own_limit(tiny):
    """Also where others in the batch go on, and where it would have ended just behind it."""
    model, tokenizer = tiny
    ends = end_tokens_of(*tiny)
    ids = [render_prompt(tokenizer, messages) for messages in PROMPTS]
    engine = TransformersEngine(model, tokenizer, GenerationSettings(20, 1.0))
    free = engine.generate([Request(prompt, 20, number) for number, prompt in enumerate(ids)])
    limits = [max(1, generated.num_tokens) if generated.ended else 7 for generated in free]
    cut = engine.generate([Request(*one, number) for number, one in enumerate(zip(ids, limits, strict=True))])
    assert any(generated.ended for generated in free)
    for whole, part, limit in zip(free, cut, limits, strict=True):
        if whole.num_tokens:
            assert (part.num_tokens, part.ended) == (limit, False)
            assert whole.text.startswith(part.text)
        else:
            assert part == whole, "ended by its first token"
    assert len(ends) > 1


def test_an_answer_at_its_limit_is_not_decoded_on(tiny):
    model, tokenizer = tiny
    ids = [render_prompt(tokenizer, messages) for messages in PROMPTS[:4]]
    rows = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    settings = GenerationSettings(20, 1.0)
    requests = [
        Request(prompt, limit, number) for number, (prompt, limit) in enumerate(zip(ids, (20, 2, 9, 1), strict=True))
    ]
    answers = TransformersEngine(model, tokenizer, settings).generate(requests)
    hook.remove()
    assert sum(rows) == sum(generated.num_tokens + generated.ended for generated in answers) < 4 * len(rows)


def test_nothing_is_kept_for_gradients(tiny, monkeypatch):
    model, tokenizer = tiny
    seen, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **o: seen.append(torch.is_inference_mode_enabled()) or generate(**o))
    generate_texts(model, tokenizer, PROMPTS[:1], GenerationSettings(2))
    assert seen == [True]


def test_answers_fit_into_the_model(tiny, monkeypatch):
    model, tokenizer = tiny
    sizes = [len(render_prompt(tokenizer, messages)) for messages in PROMPTS]
    monkeypatch.setattr(model.config, "max_position_embeddings", max(sizes) + 3)
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokenizer.eos_token_id)
    answers = generate_texts(model, tokenizer, PROMPTS, GenerationSettings(9))
    assert [generated.num_tokens for [generated] in answers] == [min(9, max(sizes) + 3 - size) for size in sizes]
    monkeypatch.setattr(model.config, "max_position_embeddings", min(sizes))
    with pytest.raises(
        ValueError, match=rf"prompt 0: it has {sizes[0]} tokens, but the model holds {min(sizes)} .*leave"
    ):
        generate_texts(model, tokenizer, PROMPTS, GenerationSettings(9))


def test_the_model_is_left_in_its_mode_even_after_a_failure(tiny):
    model, tokenizer = tiny
    generate_texts(model.train(), tokenizer, PROMPTS[:1], GenerationSettings(2))
    assert model.training
    bad = SimpleNamespace(eos_token_id=4, pad_token_id="x", name_or_path="")
    with pytest.raises((TypeError, ValueError)):
        TransformersEngine(model, bad, GenerationSettings(2)).generate([Request([1], 2, 0), Request([1, 2], 2, 1)])
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2}, "samples 2: greedy answers are all the same; give a temperature"),
        ({"temperature": -1}, "temperature -1, top_p 1.0: use >= 0"),
        ({"top_p": 0}, "temperature 0.0, top_p 0: use"),
        ({"samples": 0}, "samples 0: use at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(4, **options)


def test_vllm_is_asked_with_a_seed_for_each_answer(tiny, monkeypatch):
    tokenizer = tiny[1]
    fake = FakeVllm(tokenizer.eos_token_id)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    settings = GenerationSettings(6, 0.6, 0.9, samples=2, seed=7)
    engine = VllmEngine("some/model", tokenizer, settings, max_length=20)
    assert fake.options == {"model": "some/model", "max_model_len": 20}
    rendered = [[10, 11, 12], list(range(20, 29))]
    answers = answer(engine, make_requests(rendered, settings), batch_size=3)
    assert [generated.ended for generated in answers] == [True, True, False, False]
    assert [generated.num_tokens for generated in answers] == [3, 3, 6, 6]
    assert answers[0].text == tokenizer.decode([12, 11, 10])
    assert answers[2].text == tokenizer.decode([28, 27, 26, 25, 24, 23])
    params = [one for call in fake.calls for one in call]
    assert [len(call) for call in fake.calls] == [3, 1]
    assert {(one.temperature, one.top_p, one.max_tokens) for one in params} == {(0.6, 0.9, 6)}
    seeds = [one.seed for one in params]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    answer(engine, make_requests(rendered, settings), batch_size=1)
    assert [one.seed for call in fake.calls[2:] for one in call] == seeds


def test_missing_vllm_is_named_with_its_extra(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ImportError, match=r"engine vllm: .*pip install 'hybridize\[serve\]', or use engine transformers"
    ):
        VllmEngine("some/model", tiny[1], GenerationSettings(4), 8)

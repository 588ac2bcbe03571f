"""Sampling: the model's own distribution, whatever is sampled beside, and no further than the end."""

from types import SimpleNamespace

import pytest
import torch

from hybridize.data import sampling
from hybridize.data.sampling import Draw, Round, draw_uniform, end_tokens_of, sample_answers
from hybridize.models.growing_cache import GrowingLayer, make_cache
from hybridize.spec import (
    GatedDeltaNetSpec,
    KimiDeltaAttentionSpec,
    LayoutSpec,
    Mamba1Spec,
    Mamba2Spec,
    SlidingWindowSpec,
)
from hybridize.transfer import convert
from tiny_families import build_teacher

END = 3
VOCABULARY = 61


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shares(logits, numbers, **options):
    """How often each token is drawn."""
    scores = torch.as_tensor(logits).expand(len(numbers), -1)
    left = Draw(numbers, width=2, **options)(torch.zeros(len(numbers), 2), scores)
    assert (left.eq(0).sum(-1) == 1).all()
    assert left.isinf().sum() == left.numel() - len(left)
    return torch.bincount(left.argmax(-1), minlength=scores.shape[1]) / len(numbers)


EVENLY = ((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)[:, None]


@pytest.mark.parametrize("top_p", [1.0, 1 - 1e-12], ids=["as they stand", "by rank"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draw_follows_the_tempered_distribution(temperature, top_p):
    logits = torch.tensor([0.3, -1.0, 2.0, 1.9, -torch.inf, 0.3])
    expected = torch.softmax(logits / temperature, -1)
    drawn = shares(logits, EVENLY, temperature=temperature, top_p=top_p)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.75, [1, 3, 0]), (1.0, [0, 1, 2, 3])],
)
def test_the_nucleus_is_the_likeliest_tokens_that_reach_top_p(top_p, kept):
    probs = torch.tensor([0.2, 0.4, 0.1, 0.3])
    drawn = shares(probs.log(), EVENLY, temperature=1.0, top_p=top_p)
    expected = torch.zeros(4)
    expected[kept] = probs[kept] / probs[kept].sum()
    assert set(drawn.nonzero().flatten().tolist()) == set(kept)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_draw_never_leads_to_a_token_without_probability(top_p):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for number, token in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        draw = Draw(torch.tensor([[number]], dtype=torch.float64), 1.0, top_p, width=1)
        assert draw(torch.zeros(1, 1), logits).argmax() == token


def test_draw_takes_each_tokens_own_number():
    draw = Draw(torch.tensor([[0.15, 0.95, 0.45]], dtype=torch.float64), 1.0, width=5)
    logits = torch.zeros(1, 10)
    assert [int(draw(torch.zeros(1, length), logits).argmax()) for length in (5, 6, 7)] == [1, 9, 4]


def test_uniform_numbers_belong_to_the_key():
    def row(*key, size=5):
        return draw_uniform([key], size)[0].tolist()

    assert len({tuple(row(*key)) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0), (-1, 0)]}) == 6
    assert row(0, 0, size=9)[:5] == row(0, 0)
    assert draw_uniform([(0, 3, 1), (0, 0, 0)], 5)[1].tolist() == row(0, 0, 0)


def test_uniform_numbers_of_many_keys_are_uniform():
    numbers = draw_uniform([(0, prompt, sample) for prompt in range(1000) for sample in range(2)], 3)
    assert numbers.dtype == torch.float64
    for column in (*numbers.T, numbers.T[0] + numbers.T[1]):  # the sum modulo 1: neighbours are independent
        counts = torch.histc(column.remainder(1).float(), 10, 0, 1)
        assert (counts - 200).abs().max() < 4.5 * 200**0.5


@pytest.fixture(params=["hybrid", "teacher"])
def model(request):
    teacher = build_teacher("llama").double()
    if request.param == "teacher":
        return teacher
    return convert(teacher, LayoutSpec.replace(4, [0, 2], Mamba1Spec(state_size=4)), "random", seed=1)[0].double()


PROMPTS = [[1, 7], [1, 9, 30, 31, 32, 5, 12], [1, 8, 8], [1, 44, 45, 46]]
KEYS = [(0, 0), (0, 1), (0, 2), (0, 3)]


def sample(model, prompts=PROMPTS, keys=KEYS, **changes):
    settings = {"max_new_tokens": 40, "temperature": 1.0, "end_tokens": [END], "pad_token": 0}
    return sample_answers(model, prompts, keys, **settings | changes)


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.8}, {"temperature": 0.0}], ids=["whole", "nucleus", "greedy"])
def test_answers_do_not_depend_on_their_neighbours(model, changes):
    together = sample(model, **changes)
    assert together == [sample(model, [p], [k], **changes)[0] for p, k in zip(PROMPTS, KEYS, strict=True)]
    assert together == sample(model, **changes), "nor on what was drawn before"
    other = sample(model, keys=[(1, 0), (1, 1), (1, 2), (1, 3)], **changes)
    alike = set(map(tuple, sample(model, [PROMPTS[0]] * 4, **changes)))
    if "temperature" in changes:
        assert (other, len(alike)) == (together, 1)
    else:
        assert other != together
        assert len(alike) == 4


def logits_of(model, prompt, answer):
    """Computed anew, without cache and padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_every_token_is_drawn_from_the_models_distribution(model, top_p):
    """With a draw of our own."""
    answer = sample(model, temperature=0.7, top_p=top_p)[1]
    expected = []
    for logits, number in zip(logits_of(model, PROMPTS[1], answer), draw_uniform([KEYS[1]], 40)[0], strict=False):
        probs = torch.softmax(logits / 0.7, -1)
        order = probs.argsort(descending=True) if top_p < 1 else torch.arange(VOCABULARY)
        num_kept = 1 + int((probs[order].cumsum(-1) < top_p).sum()) if top_p < 1 else VOCABULARY
        kept = probs[order[:num_kept]]
        expected.append(int(order[int((kept.cumsum(-1) / kept.sum() <= number).sum())]))
    assert answer == expected


def test_without_temperature_the_likeliest_token_is_taken(model):
    for prompt, answer in zip(PROMPTS, sample(model, temperature=0.0), strict=True):
        assert answer == logits_of(model, prompt, answer).argmax(-1).tolist()


def test_answers_end_with_the_first_end_token(model):
    answers = sample(model, PROMPTS * 8, [(2, i) for i in range(32)])
    ended = [answer for answer in answers if END in answer]
    assert 0 < len(ended) < 32
    assert all(answer.index(END) == len(answer) - 1 for answer in ended)
    assert all(len(answer) == 40 for answer in answers if END not in answer)
    assert {answer[-1] for answer in sample(model, end_tokens=range(VOCABULARY))} - {END}
    assert all(len(answer) == 1 for answer in sample(model, end_tokens=range(VOCABULARY)))


@pytest.fixture
def forwards(monkeypatch):
    """Of a model: the rows of each forward, and how often `generate` was called."""

    def watch(model):
        rows, calls, generate = [], [], model.generate
        model.register_forward_pre_hook(lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True)
        monkeypatch.setattr(model, "generate", lambda **options: calls.append(1) or generate(**options))
        return rows, calls

    return watch


MIXERS = [
    Mamba1Spec(state_size=4),
    Mamba2Spec(),
    GatedDeltaNetSpec(),
    KimiDeltaAttentionSpec(),
    SlidingWindowSpec(window=5),
]
ENDS = [END, 11, 17, 23, 29, 31, 37]


@pytest.mark.parametrize("temperature", [1.0, 0.0], ids=["sampled", "greedy"])
@pytest.mark.parametrize(
    ("mixer", "layers"),
    [*((mixer, [0, 2]) for mixer in MIXERS), (Mamba1Spec(state_size=4), [0, 1, 2, 3])],
    ids=[*(mixer.type for mixer in MIXERS), "all mamba1"],
)
def test_answers_that_leave_change_no_other(mixer, layers, temperature, forwards, monkeypatch):
    """Nor what they say themselves: all is as `generate` gives it in one go, with prompts of several lengths."""
    hybrid = convert(build_teacher("llama").double(), LayoutSpec.replace(4, layers, mixer), "random", seed=1)[
        0
    ].double()
    prompts = [prompt * times for times in (1, 2) for prompt in PROMPTS]
    given = {"keys": [(7, i) for i in range(8)], "end_tokens": ENDS, "temperature": temperature}
    rows, calls = forwards(hybrid)
    answers = sample(hybrid, prompts, max_new_tokens=[40, 30, 5, 40, 20, 1, 40, 40], **given)
    in_rounds = sum(rows), len(calls)
    monkeypatch.setattr(sampling, "rows_can_leave", lambda cache: False)
    assert answers == sample(hybrid, prompts, max_new_tokens=[40, 30, 5, 40, 20, 1, 40, 40], **given)
    assert len(set(map(len, answers))) > 2
    assert in_rounds[1] > 2
    assert len(calls) == in_rounds[1] + 1
    assert in_rounds[0] < sum(rows) - in_rounds[0]


@pytest.mark.parametrize("family", ["mistral", "gemma2"], ids=["sliding", "partly sliding"])
def test_answers_leave_models_with_windows_of_their_own(family, forwards, monkeypatch):
    teacher = build_teacher(family).double()
    rows, _ = forwards(teacher)
    answers = sample(teacher, end_tokens=ENDS)
    left = sum(rows)
    monkeypatch.setattr(sampling, "rows_can_leave", lambda cache: False)
    assert answers == sample(teacher, end_tokens=ENDS)
    assert left < sum(rows) - left


def test_a_small_batch_is_left_at_once(model, forwards):
    rows, _ = forwards(model)
    answers = sample(model, end_tokens=ENDS, max_new_tokens=[40, 9, 40, 40])
    assert len(set(map(len, answers))) > 2
    assert rows == [sum(len(answer) > step for answer in answers) for step in range(max(map(len, answers)))]


def test_a_large_batch_is_left_when_it_pays(forwards):
    teacher = build_teacher("llama")
    rows, calls = forwards(teacher)
    keys = [(5, i) for i in range(64)]
    answers = sample(teacher, PROMPTS * 16, keys, end_tokens=ENDS)
    ended_at = set(map(len, answers))
    wasted = sum(rows) - sum(map(len, answers))
    assert 1 < len(calls) < len(ended_at)
    assert 0 < wasted < sum(rows) / 4 < 64 * len(rows) - sum(map(len, answers))


def test_all_that_end_together_are_one_round(model, forwards):
    rows, calls = forwards(model)
    sample(model, end_tokens=[VOCABULARY])
    assert (rows, len(calls)) == ([4] * 40, 1)


def test_a_round_is_over_when_a_quarter_of_a_step_is_wasted():
    one_round = Round(torch.tensor([9] * 11 + [6]), [END, 11])
    tokens = torch.full((12, 4), END)  # a prompt may hold the tokens that end answers

    def add(*ended):
        nonlocal tokens
        new = torch.full((12, 1), 7)
        new[list(ended)] = 11
        tokens = torch.cat([tokens, new], dim=1)
        return one_round(tokens, None).nonzero().flatten().tolist()

    assert add(2) == [2]
    assert add() == list(range(12)), "one waited for a step, and now two would"
    assert one_round.ended_R.nonzero().flatten().tolist() == [2, 11]


def test_every_answer_has_its_own_limit(model):
    whole = sample(model)
    limits = [3, 40, 1, 12]
    assert sample(model, max_new_tokens=limits) == [answer[:n] for answer, n in zip(whole, limits, strict=True)]


class OddLayer(GrowingLayer):
    """Of a kind that is not known, which may hold more than what is reordered."""

    def reorder_cache(self, beam_idx):
        raise AssertionError("it is left alone")


@pytest.mark.parametrize("reason", ["unknown layer", "sharded"])
def test_nobody_leaves_where_rows_cannot_be_chosen(reason, model, forwards, monkeypatch):
    expected = sample(model, end_tokens=ENDS, max_new_tokens=[40, 9, 40, 40])

    def odd_cache(*args):
        cache = make_cache(*args)
        cache.layers = [OddLayer() if type(layer) is GrowingLayer else layer for layer in cache.layers]
        return cache

    if reason == "sharded":
        monkeypatch.setattr(sampling, "is_fsdp_managed_module", lambda _: True)
    else:
        monkeypatch.setattr(sampling, "make_cache", odd_cache)
    rows, calls = forwards(model)
    assert sample(model, end_tokens=ENDS, max_new_tokens=[40, 9, 40, 40]) == expected
    assert (set(rows), len(calls)) == ({4}, 1)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_the_models_own_habits_are_put_aside_and_kept(model, temperature):
    expected = sample(model.train(), temperature=temperature)
    assert model.training
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1
    assert sample(model, temperature=temperature) == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_mode_and_habits_come_back_after_a_failure(model, monkeypatch):
    habits = model.train().generation_config

    def fail(**_):
        assert not model.training
        assert model.generation_config is not habits
        raise MemoryError

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(MemoryError):
        sample(model)
    assert model.training
    assert model.generation_config is habits


def test_end_tokens_are_the_tokenizers_and_the_models():
    tokenizer = SimpleNamespace(eos_token_id=3, name_or_path="some/name")

    def end_tokens(named):
        return end_tokens_of(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named)), tokenizer)

    assert end_tokens_of(None, tokenizer) == end_tokens_of(SimpleNamespace(), tokenizer) == end_tokens(None) == [3]
    assert end_tokens([5, 3]) == [3, 5]
    assert end_tokens(9) == [3, 9]
    tokenizer.eos_token_id = None
    assert end_tokens(0) == [0]
    with pytest.raises(ValueError, match=r"tokenizer some/name: it has no eos_token, .* set tokenizer\.eos_token"):
        end_tokens_of(None, tokenizer)

"""Sampling: the model's own distribution, whatever is sampled beside, and no further than the end."""

import pytest
import torch

from hybridize.training.sampling import Draw, end_tokens_of, sample_answers

END = 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draw_follows_the_distribution(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, -torch.inf])
    expected = torch.softmax(logits / temperature, -1)
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    draw = Draw(numbers[:, None], temperature, width=2)
    left = draw(torch.zeros(10_000, 2), logits.expand(10_000, -1))
    assert (left.eq(0).sum(-1) == 1).all()
    assert left.isinf().sum() == 4 * 10_000
    counts = torch.bincount(left.argmax(-1), minlength=5) / 10_000
    torch.testing.assert_close(counts, expected, rtol=0, atol=2e-4)


def test_draw_never_leads_to_a_token_without_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for number, token in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        draw = Draw(torch.tensor([[number]], dtype=torch.float64), 1.0, width=1)
        assert draw(torch.zeros(1, 1), logits).argmax() == token


@pytest.fixture(params=["hybrid", "teacher"])
def model(request, teacher, tools):
    teacher.double()
    return tools.student(teacher) if request.param == "hybrid" else teacher


PROMPTS = [[1, 7], [1, 9, 30, 31, 32, 5, 12], [1, 8, 8], [1, 44, 45, 46]]
KEYS = [(0, 0), (0, 1), (0, 2), (0, 3)]


def _sample(model, prompts=PROMPTS, keys=KEYS, **changes):
    settings = {"max_new_tokens": 40, "temperature": 1.0, "end_tokens": [END], "pad_token": 0}
    return sample_answers(model, prompts, keys, **settings | changes)


def test_answers_do_not_depend_on_their_neighbours(model):
    together = _sample(model)
    assert together == [_sample(model, [p], [k])[0] for p, k in zip(PROMPTS, KEYS, strict=True)]
    assert together == _sample(model), "nor on what was drawn before"
    assert together != _sample(model, keys=[(1, 0), (1, 1), (1, 2), (1, 3)])
    assert len(set(map(tuple, _sample(model, [PROMPTS[0]] * 4)))) == 4


def test_every_token_is_drawn_from_the_models_distribution(model):
    """Computed anew without cache and padding, with a draw of our own."""
    numbers = __import__("numpy").random.default_rng((0, 1)).random(40)
    answer = _sample(model, temperature=0.7)[1]
    ids = torch.tensor([PROMPTS[1] + answer])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(PROMPTS[1]) - 1 : -1]
    shares = torch.softmax(logits.double() / 0.7, -1).cumsum(-1)
    assert answer == [int((share <= number).sum()) for share, number in zip(shares, numbers, strict=False)]


def test_answers_end_with_the_first_end_token(model):
    answers = _sample(model, PROMPTS * 8, [(2, i) for i in range(32)])
    ended = [answer for answer in answers if END in answer]
    assert 0 < len(ended) < 32
    assert all(answer.index(END) == len(answer) - 1 for answer in ended)
    assert all(len(answer) == 40 for answer in answers if END not in answer)
    assert {answer[-1] for answer in _sample(model, end_tokens=range(61))} - {END}
    assert all(len(answer) == 1 for answer in _sample(model, end_tokens=range(61)))


def test_the_models_own_habits_are_put_aside_and_kept(model):
    expected = _sample(model.train())
    assert model.training
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1
    assert _sample(model) == expected
    assert model.generation_config.repetition_penalty == 5.0
    model.eval()


def test_end_tokens_are_the_tokenizers_and_the_models(model, tools):
    assert end_tokens_of(model, tools.chat) == [3]
    model.generation_config.eos_token_id = [5, 3]
    assert end_tokens_of(model, tools.chat) == [3, 5]
    model.generation_config.eos_token_id = 9
    assert end_tokens_of(model, tools.chat) == [3, 9]

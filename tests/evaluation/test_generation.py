import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from hybridize.data.chat import render, render_prompt
from hybridize.data.world import TASKS, draw_problem
from hybridize.evaluation import evaluate_problems, generate_replies, summarise


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, and threads that wait for one another cost much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    path = Path(__file__).parents[2] / "examples" / "pocket_teacher" / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("pocket_teacher_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train_tokenizer(problems_per_cell=40)


@pytest.fixture
def problems():
    return [draw_problem(task, level, "test", i) for i in range(3) for level in (1, 3) for task in TASKS]


class Parrot:
    """Knows what to say to each prompt, and checks how it is asked."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, problems, reply_of):
        self.pad, self.stop = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.replies = {
            tuple(render_prompt(tokenizer, problem.messages[:1])): reply_of(problem) for problem in problems
        }
        self.batch_sizes = []
        self.training = True
        self.modes = []
        self.generation_config = GenerationConfig(num_beams=3, repetition_penalty=2.0, eos_token_id=self.stop)

    def eval(self):
        return self.train(False)

    def train(self, mode=True):
        self.training = mode
        return self

    def generate(
        self,
        input_ids,
        attention_mask,
        max_new_tokens,
        do_sample,
        pad_token_id,
        eos_token_id,
        use_cache,
    ):
        assert (do_sample, use_cache) == (False, True)
        assert self.generation_config.to_diff_dict() == GenerationConfig().to_diff_dict()  # plainly greedy
        assert not torch.is_grad_enabled()
        assert (pad_token_id, eos_token_id) == (self.pad, [self.stop])
        assert input_ids.shape == attention_mask.shape
        self.batch_sizes.append(len(input_ids))
        self.modes.append(self.training)
        output = torch.full((len(input_ids), input_ids.shape[1] + max_new_tokens), self.pad)
        output[:, : input_ids.shape[1]] = input_ids
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            num_padding = int((mask == 0).sum())
            assert mask[:num_padding].sum() == 0  # all of it on the left
            assert (ids[:num_padding] == self.pad).all()
            reply = self.replies[tuple(ids[num_padding:].tolist())][:max_new_tokens]
            output[row, input_ids.shape[1] :][: len(reply)] = torch.tensor(reply)
        assert (attention_mask.sum(1) == input_ids.shape[1]).any()  # no wider than the longest prompt
        return output


def gold_of(tokenizer):
    def reply(problem):
        rendered = render(tokenizer, problem.messages)
        return rendered.input_ids[rendered.num_prompt_tokens :]

    return reply


def test_gold_replies_are_all_right(tokenizer, problems):
    model = Parrot(tokenizer, problems, gold_of(tokenizer))
    summary = evaluate_problems(model, tokenizer, problems, batch_size=5)
    for score in (summary["overall"], *summary["tasks"].values()):
        assert score["accuracy"] == 1
        assert score["steps_correct"] == score["total"]
    assert summary["overall"]["total"] == len(problems)
    assert set(summary["tasks"]) == set(TASKS)
    assert sum(score["total"] for score in summary["tasks"].values()) == len(problems)
    gold = [gold_of(tokenizer)(problem) for problem in problems]
    assert summary["num_tokens"] == sum(len(reply) - 1 for reply in gold)  # the end is not counted
    assert summary["seconds"] > 0
    assert max(model.batch_sizes) == 5
    assert sum(model.batch_sizes) == len(problems)
    assert model.modes == [False] * len(model.modes)
    assert model.training  # as it was


def test_wrong_answers_count_nothing_and_wrong_steps_are_told_apart(tokenizer, problems):
    def wrong(problem):
        ids = tokenizer(f"<think>\n{problem.thinking}\n</think>\n12345", add_special_tokens=False).input_ids
        return [*ids, tokenizer.eos_token_id]

    def lucky(problem):
        ids = tokenizer(f"<think>\nso\n</think>\n{problem.answer}", add_special_tokens=False).input_ids
        return [*ids, tokenizer.eos_token_id]

    overall = evaluate_problems(Parrot(tokenizer, problems, wrong), tokenizer, problems)["overall"]
    assert (overall["correct"], overall["steps_correct"]) == (0, 0)
    overall = evaluate_problems(Parrot(tokenizer, problems, lucky), tokenizer, problems)["overall"]
    assert (overall["correct"], overall["steps_correct"]) == (len(problems), 0)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_attempts_come_in_the_order_of_the_problems(tokenizer, problems, batch_size):
    model = Parrot(tokenizer, problems, gold_of(tokenizer))
    progress = []
    attempts = generate_replies(
        model, tokenizer, problems, batch_size, lambda done, total: progress.append((done, total))
    )
    assert [attempt.problem for attempt in attempts] == problems
    for attempt in attempts:
        assert attempt.reply == attempt.problem.messages[-1]["content"]
        assert attempt.verdict.correct
    assert progress[-1] == (len(problems), len(problems))
    assert len(progress) == -(-len(problems) // batch_size)


def test_a_reply_that_runs_on_is_cut_at_its_own_budget(tokenizer, problems):
    token = tokenizer(" red", add_special_tokens=False).input_ids[0]
    model = Parrot(tokenizer, problems, lambda problem: [token] * 5000)
    gold = gold_of(tokenizer)
    for attempt in generate_replies(model, tokenizer, problems, batch_size=100):
        assert attempt.num_tokens == 3 * len(gold(attempt.problem)) // 2 + 16
        assert not attempt.verdict.answer_correct


def test_what_follows_the_end_is_not_read(tokenizer, problems):
    gold = gold_of(tokenizer)
    tail = tokenizer(" 7", add_special_tokens=False).input_ids
    model = Parrot(tokenizer, problems, lambda problem: gold(problem) + tail)
    assert evaluate_problems(model, tokenizer, problems)["overall"]["accuracy"] == 1


def test_summaries_count_per_task(tokenizer, problems):
    model = Parrot(tokenizer, problems, gold_of(tokenizer))
    attempts = generate_replies(model, tokenizer, problems)
    chosen = [attempt for attempt in attempts if attempt.problem.task == "swaps"]
    summary = summarise(chosen)
    assert list(summary["tasks"]) == ["swaps"]
    assert summary["tasks"]["swaps"] == summary["overall"]


def test_no_problems_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="problems: none were given; ask for at least one"):
        evaluate_problems(None, tokenizer, [])


def test_a_random_model_runs_through_whatever_the_batch(tokenizer):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MistralForCausalLM(config).train()
    problems = [draw_problem(task, 1, "test", i) for task in TASKS for i in range(2)]
    together = generate_replies(model, tokenizer, problems, batch_size=len(problems))
    alone = generate_replies(model, tokenizer, problems, batch_size=1)
    assert [attempt.reply for attempt in together] == [attempt.reply for attempt in alone]
    assert all(attempt.num_tokens > 0 for attempt in together)
    assert model.training


@pytest.fixture(scope="module")
def trained():
    from transformers import AutoTokenizer

    from hybridize.models import load_teacher

    folder = Path(__file__).parents[2] / "models" / "pocket-teacher"
    return load_teacher(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_several_samples_of_a_trained_teacher_give_pass_at_k(trained):
    problems = [draw_problem(task, 1, "test", i) for task in ("recall", "addition") for i in range(3)]
    attempts = generate_replies(*trained, problems, 12, samples=2, temperature=2.0, seed=1)
    assert [attempt.problem for attempt in attempts] == [problem for problem in problems for _ in range(2)]
    right = [attempt.verdict.answer_correct for attempt in attempts]
    assert 0 < sum(right) < len(right)
    summary = summarise(attempts, samples=2)
    overall = summary["overall"]
    assert (overall["correct"], overall["total"]) == (sum(right), 12)
    assert summary["pass_at"] == overall["pass_at"]
    assert summary["pass_at"]["1"]["accuracy"] == pytest.approx(sum(right) / 12) == overall["accuracy"]
    solved = sum(right[i] or right[i + 1] for i in range(0, 12, 2))
    assert summary["pass_at"]["2"]["accuracy"] == pytest.approx(solved / 6)
    assert (overall["low"], overall["high"]) == tuple(summary["pass_at"]["1"][end] for end in ("low", "high"))
    for task, numbers in (("recall", right[:6]), ("addition", right[6:])):
        assert summary["tasks"][task]["pass_at"]["1"]["accuracy"] == pytest.approx(sum(numbers) / 6)
    assert "pass_at" not in summarise(attempts[::2])


def test_a_trained_teacher_is_right_however_often_it_is_asked(trained):
    problems = [draw_problem("recall", 1, "test", i) for i in range(2)]
    summary = evaluate_problems(*trained, problems, samples=2, temperature=0.6)
    assert summary["pass_at"]["1"]["accuracy"] == summary["pass_at"]["2"]["accuracy"] == 1
    assert summary["overall"]["steps_correct"] == 4


def test_greedy_samples_are_refused(tokenizer, problems):
    with pytest.raises(ValueError, match="samples 2: greedy answers are all the same; give a temperature"):
        evaluate_problems(Parrot(tokenizer, problems, gold_of(tokenizer)), tokenizer, problems, samples=2)

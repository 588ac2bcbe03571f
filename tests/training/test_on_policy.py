"""Distillation on own answers: the loss is TRL's on the same answers, at the student's tokens and nowhere else."""

import os

import pytest
import torch

from hybridize.data.chat import render_prompt
from hybridize.data.packing import PAD_TOKEN
from hybridize.data.sampling import sample_answers
from hybridize.data.world import draw_problem
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.spec.stages import OnPolicyStage
from hybridize.training import distill_on_policy, heldout_divergence, on_policy, read_metrics
from hybridize.training.on_policy import answered_rows
from hybridize.transfer import convert


@pytest.fixture
def heard(monkeypatch):
    """Prompts and answers of each step of the runs of a test, as they were sampled."""
    steps = []

    def listening(model, prompts, keys, **settings):
        answers = sample_answers(model, prompts, keys, **settings)
        steps.append((prompts, keys, answers, settings))
        return answers

    monkeypatch.setattr(on_policy, "sample_answers", listening)
    return steps


def _run(tools, folder, *, student=None, prompts=None, tokenizer=None, **changes):
    teacher = tools.teacher()
    student = tools.student(teacher) if student is None else student
    stage = tools.stage(OnPolicyStage, **{"prompts_per_step": 4, "max_new_tokens": 12} | changes)
    prompts = tools.prompts(10) if prompts is None else prompts
    result = distill_on_policy(student, teacher, prompts, tokenizer or tools.chat, stage, folder)
    return result, student, read_metrics(folder / "metrics.jsonl")


def _gkd_loss():
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize(("loss", "beta"), [("reverse_kl", 1.0), ("forward_kl", 0.0), ("jsd", 0.5)])
def test_loss_is_that_of_gkd_on_the_same_answers(loss, beta, heard, tools, tmp_path):
    """TRL's formula over whole logits, every prompt and answer alone."""
    teacher = tools.teacher()
    student = tools.student(teacher)
    _, _, records = _run(tools, tmp_path, steps=1, loss=loss, temperature=1.5)
    prompts, _, answers, _ = heard[0]
    total, num_tokens = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            q, p = (model(input_ids=ids).logits[:, len(prompt) - 1 : -1] for model in (student, teacher))
        total += _gkd_loss()(q, p, beta=beta, temperature=1.5, reduction="sum").item()
        num_tokens += len(answer)
    assert records[0]["loss_nats"] == pytest.approx(total / num_tokens, rel=1e-5)
    assert records[0]["loss_tokens"] == num_tokens
    assert records[0]["tokens"] == num_tokens + sum(map(len, prompts))


def test_nothing_counts_after_the_end(heard, tools, tmp_path):
    _, _, records = _run(tools, tmp_path, steps=3, prompts_per_step=8, tokens_per_step=8 * 24, max_new_tokens=30)
    seen = 0
    for (_, _, answers, _), record in zip(heard, records, strict=True):
        assert all(3 not in answer[:-1] for answer in answers)
        seen += sum(map(len, answers))
        assert record["loss_tokens"] == seen
        assert record["share_ended"] == sum(answer[-1] == 3 for answer in answers) / 8
    assert 0 < sum(record["share_ended"] for record in records) < 3


def test_rows_count_answers_only():
    rows = answered_rows([[5, 6, 7], [8]], [[9], [10, 11, 12]])
    batch = rows.collate([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 10, 11, 12]]
    assert batch["valid"].tolist() == [[False, False, True, False], [True, True, True, False]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    shorter = answered_rows([[5], [8]], [[9], [10, 11]])
    assert shorter.collate([shorter[0], shorter[1]])["input_ids"].tolist() == [[5, 9, PAD_TOKEN], [8, 10, 11]]


def test_prompts_are_taken_in_order_over_and_over(heard, tools, tmp_path):
    prompts = tools.prompts(3)
    _run(tools, tmp_path, steps=2, prompts=prompts)
    ids = [render_prompt(tools.chat, messages) for messages in prompts]
    assert [list(prompt) for step in heard for prompt in step[0]] == [ids[i % 3] for i in range(8)]
    assert [key for step in heard for key in step[1]] == [(0, turn) for turn in range(8)]
    assert heard[0][2] != heard[1][2]


def test_answers_come_from_the_student_as_it_is_now(heard, tools, tmp_path):
    """Those of the second step are the trained student's, at the temperature asked for."""
    settings = {"prompts": tools.prompts(4), "learning_rate": 3e-2, "steps": 1, "schedule": "constant"}
    _, student, _ = _run(tools, tmp_path / "one", **settings)
    _run(tools, tmp_path / "two", **settings | {"steps": 2, "generation_temperature": 1.0})
    prompts, keys, answers, given = heard[2]
    assert sample_answers(student, prompts, keys, **given) == answers
    assert given["temperature"] == 1.0
    _run(tools, tmp_path / "cold", **settings | {"generation_temperature": 0.01})
    ids = torch.tensor([heard[3][0][0]])
    fresh = tools.student(tools.teacher())
    greedy = fresh.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=3, pad_token_id=0)
    assert heard[3][2][0] == greedy[0, ids.shape[1] :].tolist()


def test_seed_decides_the_answers(heard, tools, tmp_path):
    _run(tools, tmp_path / "one", steps=1)
    _run(tools, tmp_path / "same", steps=1)
    _run(tools, tmp_path / "other", steps=1, seed=1)
    assert heard[0][2] == heard[1][2] != heard[2][2]


def test_what_answers_are_sampled_in_does_not_hinder_training(tools, tmp_path, monkeypatch):
    """No inference mode, whose tensors (those that a model keeps) autograd refuses; bf16 on a GPU."""
    seen = []

    def looking(*arguments, **settings):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        seen.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device)))
        return sample_answers(*arguments, **settings)

    monkeypatch.setattr(on_policy, "sample_answers", looking)
    _run(tools, tmp_path, steps=1)
    assert seen == [(False, torch.cuda.is_available())]


def test_settings_of_packed_rows_do_not_matter(heard, tools, tmp_path):
    """A run may go on with others: they are not read."""
    _run(tools, tmp_path, steps=2)
    result, *_ = _run(tools, tmp_path, steps=2, tokens_per_step=8 * 48, sequence_length=48)
    assert result.resumed_from_step == 2


def test_other_prompts_refuse_to_resume(tools, tmp_path):
    _run(tools, tmp_path, steps=2)
    with pytest.raises(ValueError, match="belongs to a run with another prompts"):
        _run(tools, tmp_path, steps=2, prompts=tools.prompts(10, seed=1))


def test_on_policy_refuses(tools, tmp_path):
    with pytest.raises(ValueError, match="prompts: there are none to answer; give at least one"):
        _run(tools, tmp_path, prompts=[])
    endless = type(tools.chat)()
    endless.eos_token_id = None
    with pytest.raises(ValueError, match="tokenizer NumberChat: it has no eos_token, so no answer would ever end"):
        _run(tools, tmp_path, tokenizer=endless)
    endless.chat_template = None
    endless.eos_token_id = 3
    with pytest.raises(ValueError, match="it has no chat template"):
        _run(tools, tmp_path, tokenizer=endless)


@pytest.mark.slow
def test_damaged_trained_student_improves_on_answers_it_never_gave(pocket, tmp_path):
    teacher, tokenizer, _ = pocket
    student, _ = convert(teacher, LayoutSpec.replace(16, (6, 13), Mamba1Spec()))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".mlp." in name or "lm_head" in name:
                parameter += 0.8 * parameter.std() * torch.randn(parameter.shape, generator=noise)

    def divergence():
        chats = [draw_problem(task, 1, "test", i).messages[:1] for i in range(4) for task in ("recall", "addition")]
        prompts = [render_prompt(tokenizer, messages) for messages in chats]
        answers = sample_answers(
            student,
            prompts,
            [(1, i) for i in range(8)],
            max_new_tokens=16,
            temperature=1.0,
            end_tokens=[tokenizer.eos_token_id],
            pad_token=0,
        )
        return heldout_divergence(student, teacher, answered_rows(prompts, answers), rows_per_batch=8)

    before = divergence()
    assert before > 0.5
    prompts = [draw_problem(task, 1, "train", i).messages[:1] for i in range(16) for task in ("recall", "addition")]
    stage = OnPolicyStage(
        name="on-policy",
        model="hybrid",
        steps=6,
        prompts_per_step=8,
        rows_per_batch=8,
        max_new_tokens=16,
        learning_rate=3e-4,
    )
    distill_on_policy(student, teacher, prompts, tokenizer, stage, tmp_path)
    assert divergence() < 0.4 * before

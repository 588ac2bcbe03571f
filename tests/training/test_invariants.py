"""What holds for every way to train: batches do not matter, and neither does a kill."""

import pytest
import torch

KINDS = ["distill", "fit", "sft", "on_policy"]
LOSS = {kind: "loss_relative" if kind == "fit" else "loss_nats" for kind in KINDS}


@pytest.fixture(scope="module")
def undisturbed(tools, tmp_path_factory):
    """Results, weights and records of runs that nothing happened to, by kind."""
    return {kind: tools.train(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def _course(kind, records):
    """All that is a function of the run, time left out."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_eight_is_eight_batches_of_one(kind, tools, tmp_path):
    """Rows and answers differ in their number of tokens, so a mean of means would show."""
    weights, losses = [], []
    for rows_per_batch in (8, 1):
        changes = {"tokens_per_step": 8 * 24} | ({"prompts_per_step": 8} if kind == "on_policy" else {})
        folder = tmp_path / str(rows_per_batch)
        _, state, records = tools.train(
            kind, folder, double=True, steps=3, rows_per_batch=rows_per_batch, max_grad_norm=0.1, **changes
        )
        weights.append(state)
        losses.append([record[LOSS[kind]] for record in records])
    close = {"rtol": 0, "atol": 1e-6 if kind == "sft" else 1e-9}  # TRL scores tokens in fp32
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], **close)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kill_after", "resumed_from"), [(1, 0), (3, 2), (6, 4)])
def test_killed_run_resumes_as_if_nothing_had_happened(kind, kill_after, resumed_from, undisturbed, tools, tmp_path):
    with pytest.raises(tools.killed):
        tools.train(kind, tmp_path, kill_after=kill_after)
    result, weights, records = tools.train(kind, tmp_path)
    assert result.resumed_from_step == resumed_from
    expected, expected_weights, expected_records = undisturbed[kind]
    assert _same(weights, expected_weights)
    assert _course(kind, records) == _course(kind, expected_records)
    for field in ("steps", "tokens", "loss_tokens", "final_loss_nats", "final_loss_relative", "stopped"):
        assert getattr(result, field) == getattr(expected, field), field


@pytest.mark.parametrize("kind", KINDS)
def test_finished_run_is_not_run_again(kind, tools, tmp_path):
    _, weights, records = tools.train(kind, tmp_path, steps=2)
    result, again, records_again = tools.train(kind, tmp_path, kill_after=1, steps=2)
    assert result.resumed_from_step == 2
    assert _same(weights, again)
    assert records == records_again


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_weights_and_little_else(kind, tools, tmp_path):
    student = tools.student(tools.teacher())
    student.lm_head.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in student.parameters()]
    before = tools.copy_of(student)
    tools.train(kind, tmp_path, student=student, steps=1)
    assert not _same(before, tools.copy_of(student))
    assert flags == [parameter.requires_grad for parameter in student.parameters()]
    assert student.config.use_cache
    assert not {"forward", "model_tags"} & vars(student).keys()
    assert student.generation_config.bos_token_id == 1
    assert not student.training
    assert all(parameter.grad is None for parameter in student.parameters())
    ids = torch.randint(2, tools.vocabulary, (1, 7))
    assert student(input_ids=ids).logits.shape == (1, 7, tools.vocabulary)


@pytest.mark.parametrize("kind", KINDS)
def test_other_data_or_settings_refuse_to_resume(kind, tools, tmp_path):
    tools.train(kind, tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"another seed \(was 0, is 1\); remove"):
        tools.train(kind, tmp_path, steps=2, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_printed(kind, tools, tmp_path, capfd):
    tools.train(kind, tmp_path, steps=1)
    assert capfd.readouterr() == ("", "")

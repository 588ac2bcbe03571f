"""A run that is killed and called again ends with the bits of one that was not."""

import json
import shutil

import pytest
import torch

from hybridize.training import DivergedError, checkpoints, core, distill, read_metrics, trainer


class Killed(BaseException):
    pass


def _run(folder, tools, kill_after=None, **changes):
    """Distil a fresh student for six steps in a folder, to be killed after a step if one is given."""
    teacher = tools.teacher()
    student = tools.student(teacher)

    def on_log(record, total):
        if record["step"] == kill_after:
            raise Killed

    result = distill(student, teacher, tools.rows(24), tools.stage(**changes), folder, on_log=on_log)
    return result, tools.copy_of(student)


@pytest.fixture
def run(tools, tmp_path):
    return lambda kill_after=None, **changes: _run(tmp_path, tools, kill_after, **changes)


@pytest.fixture(scope="module")
def undisturbed(tools, tmp_path_factory):
    """Weights, losses and folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return _run(folder, tools)[1], _losses(folder), folder


def _losses(folder):
    return [(r["step"], r["loss_nats"], r["tokens"]) for r in read_metrics(folder / "metrics.jsonl")]


def _same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("kill_after", "resumed_from"), [(1, 0), (2, 0), (3, 2), (6, 4)])
def test_resumed_run_equals_an_undisturbed_one(kill_after, resumed_from, run, undisturbed, tmp_path):
    with pytest.raises(Killed):
        run(kill_after)
    result, weights = run()
    assert result.resumed_from_step == resumed_from
    assert result.steps == 6
    assert _same(weights, undisturbed[0])
    assert _losses(tmp_path) == undisturbed[1]


def test_finished_run_is_not_run_again(run, undisturbed, tmp_path):
    shutil.copytree(undisturbed[2], tmp_path, dirs_exist_ok=True)
    result, weights = run()
    assert result.resumed_from_step == 6
    assert _same(weights, undisturbed[0])
    assert _losses(tmp_path) == undisturbed[1]
    assert result.final_loss_nats == undisturbed[1][-1][1]


def test_only_the_last_two_checkpoints_are_kept(undisturbed):
    kept = {folder.name for folder in (undisturbed[2] / "checkpoints").iterdir()}
    assert kept == {"checkpoint-4", "checkpoint-6"}


def test_checkpoint_without_its_mark_is_ignored(run, undisturbed, tmp_path, monkeypatch):
    """Killed at the end of the second checkpoint, before its mark."""
    marked = core.mark_complete

    def mark_first_only(folder, identity):
        if folder.name != "checkpoint-2":
            raise Killed
        marked(folder, identity)

    monkeypatch.setattr(core, "mark_complete", mark_first_only)
    with pytest.raises(Killed):
        run()
    monkeypatch.undo()
    assert (tmp_path / "checkpoints" / "checkpoint-4" / "optimizer.pt").is_file()
    result, weights = run()
    assert result.resumed_from_step == 2
    assert _same(weights, undisturbed[0])
    assert _losses(tmp_path) == undisturbed[1]


@pytest.mark.parametrize("damage", ["cut", "missing", "mark", "no weights yet"])
def test_damaged_checkpoint_is_ignored(damage, run, undisturbed, tmp_path):
    with pytest.raises(Killed):
        run(kill_after=5)
    last = tmp_path / "checkpoints" / "checkpoint-4"
    if damage == "cut":
        file = last / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        (last / "model.safetensors").unlink()
    elif damage == "mark":
        (last / "complete.json").write_text('{"step": 4, "ident')
    else:
        shutil.rmtree(last)
        last.mkdir()
    result, weights = run()
    assert result.resumed_from_step == 2
    assert _same(weights, undisturbed[0])


def test_half_removed_checkpoint_never_counts(tmp_path):
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("x")
        checkpoints.mark_complete(folder, {})
    checkpoints.keep_last(tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    mark = json.loads((tmp_path / "checkpoint-3" / "complete.json").read_text())
    assert mark == {"step": 3, "identity": {}, "files": {"weights": 1}}


def test_batches_and_checkpoint_interval_may_change_on_resume(run, undisturbed, tmp_path):
    with pytest.raises(Killed):
        run(kill_after=3)
    result, weights = run(rows_per_batch=1, save_every=1)
    assert result.resumed_from_step == 2
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {
        "checkpoint-5",
        "checkpoint-6",
    }
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, undisturbed[0][name], rtol=0, atol=1e-4)


def test_other_settings_refuse_to_resume(run, tmp_path):
    with pytest.raises(Killed):
        run(kill_after=3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"another learning_rate \(was 0\.003, is 0\.001\); remove"):
        run(learning_rate=1e-3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("poison", ["loss", "weights"])
def test_run_stops_at_the_first_step_that_is_not_finite(poison, llama, tools, tmp_path, monkeypatch):
    student = tools.student(llama)
    divergence = trainer.batch_divergence
    calls = []

    def poisoned(student, teacher, batch, kind, temperature):
        calls.append(1)
        loss = divergence(student, teacher, batch, kind, temperature)
        return loss * float("nan") if poison == "loss" and len(calls) > 6 else loss  # two batches a step

    def on_log(record, total):
        if poison == "weights" and record["step"] == 3:
            student.model.norm.weight.data[0] = float("inf")

    monkeypatch.setattr(trainer, "batch_divergence", poisoned)
    with pytest.raises(DivergedError, match=r"step 4 of 6: the .* is nan.*step 3.*checkpoint-2.*Try a lower"):
        distill(student, llama, tools.rows(24), tools.stage(), tmp_path, on_log=on_log)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    monkeypatch.undo()
    result = distill(tools.student(llama), llama, tools.rows(24), tools.stage(), tmp_path)
    assert result.resumed_from_step == 2


def test_weights_that_are_not_finite_are_not_saved(tools, tmp_path, monkeypatch):
    """A weight that the step did not use, so that neither its loss nor its gradients tell."""
    teacher = tools.teacher("mistral")
    student = tools.student(teacher)
    divergence = trainer.batch_divergence

    def poisoned(*args):
        student.model.embed_tokens.weight.data[1] = float("inf")
        return divergence(*args)

    monkeypatch.setattr(trainer, "batch_divergence", poisoned)
    with pytest.raises(DivergedError, match=r"step 2 of 6: a weight is not finite.*no checkpoint was written"):
        distill(student, teacher, tools.rows(24), tools.stage(), tmp_path)
    assert not any((tmp_path / "checkpoints").glob("checkpoint-*"))

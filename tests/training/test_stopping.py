"""The rule that ends a distillation early: what it says, and that a kill does not change where it ends."""

import pytest
import torch

from hybridize.spec.stages import StopSpec
from hybridize.training import core, distill, heldout_divergence, read_metrics
from hybridize.training.stopping import is_due, why_stop


def _records(*losses):
    """A look every second step."""
    records = []
    for loss in losses:
        step = len(records) + 1
        records += [{"step": step}, {"step": step + 1, "heldout_nats": loss}]
    return records


@pytest.mark.parametrize(
    ("rule", "losses", "stops"),
    [
        ({"below": 0.5}, (0.6, 0.5), False),
        ({"below": 0.5}, (0.6, 0.49), True),
        ({"patience": 2}, (0.6, 0.7, 0.5, 0.6), False),
        ({"patience": 2}, (0.6, 0.7, 0.5, 0.6, 0.5), True),
        ({"patience": 2}, (0.9, 0.8, 0.7, 0.6), False),
        ({"patience": 1}, (0.6, 0.6), True),
        ({"patience": 2, "min_delta": 0.1}, (0.9, 0.85, 0.79, 0.75), False),
        ({"patience": 2, "min_delta": 0.1}, (0.9, 0.85, 0.81), True),
        ({"patience": 3, "below": 0.1}, (0.9, 0.9, 0.09), True),
        ({"patience": 1}, (), False),
    ],
)
def test_rule_reads_the_looks(rule, losses, stops):
    assert bool(why_stop(StopSpec(**rule), _records(*losses))) == stops


def test_reason_names_step_and_loss():
    assert why_stop(StopSpec(below=0.5), _records(0.6, 0.4)) == (
        "stopped at step 4: the held-out loss, 0.4 nat per token, is below 0.5"
    )
    assert why_stop(StopSpec(patience=2), _records(0.6, 0.7, 0.8)) == (
        "stopped at step 6: 2 looks in a row brought no improvement of more than 0 over the held-out loss at step 2, "
        "0.6 nat per token"
    )
    assert why_stop(None, _records(0.1)) == ""


def test_looks_come_every_so_many_steps():
    assert [step for step in range(1, 10) if is_due(StopSpec(every=3, below=1), step)] == [3, 6, 9]
    assert not is_due(None, 3)


def _run(tools, folder, stop, kill_after=None, **changes):
    teacher = tools.teacher()
    student = tools.student(teacher)
    stage = tools.stage(steps=8, stop=stop, **changes)

    def on_log(record, total):
        assert total == 8
        if record["step"] == kill_after:
            raise tools.killed

    heldout = tools.rows(3, seed=1)
    result = distill(student, teacher, tools.rows(32), stage, folder, heldout=heldout, on_log=on_log)
    return result, student, teacher, read_metrics(folder / "metrics.jsonl")


NEVER = {"every": 2, "heldout_rows": 3, "below": 1e-9}


@pytest.fixture(scope="module")
def looks(tools, tmp_path_factory):
    """The held-out losses of a run that looks and never stops, and all its records."""
    result, *_, records = _run(tools, tmp_path_factory.mktemp("never"), NEVER)
    assert (result.steps, result.stopped) == (8, "")
    assert [record["step"] for record in records if "heldout_nats" in record] == [2, 4, 6, 8]
    return {r["step"]: r["heldout_nats"] for r in records if "heldout_nats" in r}, records


def test_run_ends_where_the_rule_says(looks, tools, tmp_path):
    heldout, records = looks
    assert heldout[6] < heldout[4] < heldout[2]
    between = {"every": 2, "heldout_rows": 3, "below": (heldout[4] + heldout[6]) / 2}
    result, student, teacher, ours = _run(tools, tmp_path, between)
    assert result.steps == len(ours) == 6
    assert result.stopped.startswith("stopped at step 6: the held-out loss")
    assert result.tokens == records[5]["tokens"] == int(tools.rows(32).offsets[24])
    assert result.loss_tokens == records[5]["loss_tokens"]
    assert result.final_loss_nats == records[5]["loss_nats"]
    keys = ("loss_nats", "learning_rate", "heldout_nats")  # the rate of a schedule of eight steps
    assert [[r.get(key) for key in keys] for r in ours] == [[r.get(key) for key in keys] for r in records[:6]]
    assert heldout_divergence(student, teacher, tools.rows(3, seed=1), rows_per_batch=2) == heldout[6]


@pytest.mark.parametrize("kill", ["before the look", "after the look", "after the checkpoint", "twice"])
@pytest.mark.parametrize("save_every", [2, 5])
def test_stopped_run_ends_the_same_after_a_kill(kill, save_every, looks, tools, tmp_path, monkeypatch):
    stop = {"every": 2, "heldout_rows": 3, "below": (looks[0][2] + looks[0][4]) / 2}
    expected, student, *_, records = _run(tools, tmp_path / "undisturbed", stop, save_every=save_every)
    assert expected.steps == 4
    if kill in ("before the look", "after the look"):
        with pytest.raises(tools.killed):
            _run(tools, tmp_path, stop, 3 if kill == "before the look" else 4, save_every=save_every)
    elif kill == "after the checkpoint":

        def killed(folder):
            if (folder / "checkpoint-4" / "complete.json").is_file():
                raise tools.killed

        monkeypatch.setattr(core, "keep_last", killed)
        with pytest.raises(tools.killed):
            _run(tools, tmp_path, stop, save_every=save_every)
        monkeypatch.undo()
    else:
        _run(tools, tmp_path, stop, save_every=save_every)
    result, again, *_, ours = _run(tools, tmp_path, stop, kill_after=5, save_every=save_every)
    tools.assert_same(again, tools.copy_of(student))
    assert (result.steps, result.stopped, result.tokens) == (4, expected.stopped, expected.tokens)
    assert result.final_loss_nats == expected.final_loss_nats
    assert [(r["loss_nats"], r.get("heldout_nats")) for r in ours] == [
        (r["loss_nats"], r.get("heldout_nats")) for r in records
    ]
    if kill in ("after the checkpoint", "twice"):
        assert result.resumed_from_step == 4


def test_rule_that_fires_at_the_last_step_stopped_nothing(looks, tools, tmp_path):
    stop = {"every": 8, "heldout_rows": 3, "below": 1e9}
    result = _run(tools, tmp_path, stop)[0]
    assert (result.steps, result.stopped) == (8, "")


def test_looking_does_not_change_the_course(looks, tools, tmp_path):
    teacher = tools.teacher()
    student = tools.student(teacher)
    distill(student, teacher, tools.rows(32), tools.stage(steps=8), tmp_path)
    losses = [record["loss_nats"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses == [record["loss_nats"] for record in looks[1]]


def test_heldout_loss_is_of_the_kind_and_temperature_of_the_loss(tools, tmp_path):
    changes = {"loss": "forward_kl", "temperature": 2.0, "steps": 2}
    teacher = tools.teacher()
    student = tools.student(teacher)
    stage = tools.stage(stop={"every": 2, "heldout_rows": 2, "below": 1e-9}, **changes)
    heldout = tools.rows(3, seed=1)
    distill(student, teacher, tools.rows(8), stage, tmp_path, heldout=heldout)
    expected = heldout_divergence(student, teacher, heldout.part(0, 2), "forward_kl", temperature=2.0, rows_per_batch=2)
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["heldout_nats"] == expected


def test_heldout_rows_decide_the_course_and_refuse_to_change(tools, tmp_path):
    _run(tools, tmp_path, NEVER)
    with pytest.raises(ValueError, match="belongs to a run with another stop"):
        _run(tools, tmp_path, NEVER | {"every": 4})


@pytest.mark.parametrize("num_rows", [0, 2])
def test_stop_refuses_too_few_rows(num_rows, tools, tmp_path):
    teacher = tools.teacher()
    heldout = tools.rows(num_rows) if num_rows else None
    with pytest.raises(ValueError, match=rf"heldout: there are {num_rows} rows, but stop.heldout_rows is 3; hold out"):
        distill(
            tools.student(teacher),
            teacher,
            tools.rows(24),
            tools.stage(stop=NEVER),
            tmp_path,
            heldout=heldout,
        )


def test_stop_refuses_rows_without_completions(tools, tmp_path):
    teacher, heldout = tools.teacher(), tools.rows(3)
    heldout.completion[:] = False
    with pytest.raises(ValueError, match="heldout: it has no completion token"):
        distill(tools.student(teacher), teacher, tools.rows(24), tools.stage(stop=NEVER), tmp_path, heldout=heldout)


def test_heldout_loss_that_is_not_finite_ends_the_run(tools, tmp_path, monkeypatch):
    from hybridize.training import trainer

    monkeypatch.setattr(trainer, "heldout_divergence", lambda *_, **__: torch.nan)
    with pytest.raises(core.DivergedError, match=r"step 2 of 8: the loss on the rows held out is nan"):
        _run(tools, tmp_path, NEVER)

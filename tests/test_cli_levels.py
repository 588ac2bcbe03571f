"""The verb evaluate takes a difficulty for each task."""

import json

import pytest
from typer.testing import CliRunner

from hybridize.cli import app
from hybridize.data.world import draw_problem


def test_evaluate_draws_each_task_at_its_level(tiny_teacher, tmp_path, monkeypatch):
    drawn = []

    def watch(task, level, *rest, **kwargs):
        drawn.append((task, level))
        return draw_problem(task, level, *rest, **kwargs)

    monkeypatch.setattr("hybridize.data.world.draw_problem", watch)
    out = tmp_path / "scores.json"
    options = ["--problems", "1", "--level", "1", "--levels", "addition=2, recall=3", "--out", str(out)]
    done = CliRunner().invoke(app, ["evaluate", str(tiny_teacher), *options])
    assert done.exit_code == 0, done.output
    assert drawn == [("quantities", 1), ("addition", 2), ("swaps", 1), ("recall", 3)]
    assert json.loads(out.read_text())["overall"]["total"] == 4


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ("swaps", r"^--levels: 'swaps' is no list of tasks and levels; write e\.g\. swaps=4,recall=5$"),
        ("swaps=12", r"^evaluate\.levels\.swaps: 12 is not accepted"),
        ("swops=2", r"^evaluate\.levels: 'swops' is unknown.*did you mean 'swaps'"),
    ],
)
def test_levels_that_make_no_sense_are_named(tiny_teacher, levels, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["evaluate", str(tiny_teacher), "--levels", levels], catch_exceptions=False)

"""The example that makes tables of a run of the study."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TABLES = Path(__file__).parents[1] / "examples" / "h1_study" / "tables.py"


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("h1_study_tables", TABLES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judged(name, model, label, accuracy, level=2):
    score = {"accuracy": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.01}
    return {
        "kind": "evaluate",
        "spec": {"name": name, "model": model, "label": label, "level": level, "levels": {}},
        "metrics": {"overall": score, "tasks": {"swaps": score}},
        "seconds": 30.0,
    }


def show(tables, run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", str(run)])
    tables.main()
    return capsys.readouterr().out.splitlines()


def test_models_stand_beside_the_teacher_at_the_setting_they_were_judged_at(tables, tmp_path, monkeypatch, capsys):
    stages = {
        "judge-teacher": judged("judge-teacher", "teacher", "teacher", 0.8),
        "judge-loo": judged("judge-loo", "d-loo", "LOO order", 0.6),
        "h1-10-judge": judged("h1-10-judge", "h1-10-distill", "10 of 16", 0.9, level=1),
        "h1-10-judge-2": judged("h1-10-judge-2", "h1-10-distill", "10 of 16", 0.76),
        "d-loo": {"kind": "distill", "spec": {}, "seconds": 60.0}
        | {"metrics": {"tokens": 9_500_000, "final_loss_nats": 0.0123}},
        "rank-loo": {"kind": "rank", "spec": {}, "seconds": 0.0, "metrics": {"order": [2, 0, 1]}},
    }
    for name, stage in stages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(stage))
    recipe = {"recipe": {"stages": [{"name": name} for name in ("rank-loo", "d-loo", "judge-teacher", "judge-loo")]}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    lines = show(tables, tmp_path, monkeypatch, capsys)
    assert "| 10 of 16 | 90.0 (88.0 to 91.0) | 76.0 (74.0 to 77.0), 95.0% |  |  | swaps 76.0 |" in lines
    assert "| LOO order | 60.0 (58.0 to 61.0), 75.0% | swaps 60.0 | 9.5M | 0.0123 |" in lines
    assert "| 8 of 16 |  |  |  |  |  |" in lines, "not judged yet"
    assert lines.index("| rank-loo | 2, 0, 1 |") > 0
    assert "| evaluate | 2.0 |" in lines
    assert not any(line.startswith("| 10 of 16 | 76.0") for line in lines), "the family has a table of its own"


def test_a_folder_without_results_is_refused(tables, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.json").write_text('{"recipe": {"stages": []}}')
    with pytest.raises(SystemExit):
        show(tables, tmp_path, monkeypatch, capsys)
    assert "no stage is finished there" in capsys.readouterr().err

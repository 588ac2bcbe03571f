"""The example that compares mixers: what it refuses, and the rows that it keeps."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[1] / "examples" / "mixer_study" / "study.py"


@pytest.fixture
def study():
    spec = importlib.util.spec_from_file_location("mixer_study", STUDY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("steps", "every"), [(150, 100), (99, 24), (1, 1), (0, 1)])
def test_steps_that_the_table_could_not_show_are_refused(study, steps, every, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "run", lambda *args: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["study.py", "--out", str(tmp_path), "--steps", str(steps)])
    with pytest.raises(SystemExit):
        study.main()
    assert f"--steps {steps}: the table looks every {every} steps; pass a multiple" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [2, 4, 60, 100, 1000])
def test_other_steps_run_and_have_every_look_of_the_table(study, steps, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(study, "run", lambda *args: ran.append(args))
    monkeypatch.setattr(sys, "argv", ["study.py", "--out", str(tmp_path), "--steps", str(steps)])
    study.main()
    assert len(ran) == 1
    every = study.look_every(steps)
    trial = {"name": "identity", "steps": steps, "zero_shot": 1.0, "correct": 1, "problems": 2}
    trial["looks"] = dict.fromkeys(range(every, steps + 1, every), 0.5)
    (tmp_path / "trials.jsonl").write_text(json.dumps(trial) + "\n")
    assert f"KL, {steps:,} steps |" in study.table(tmp_path)


def test_rows_are_kept_by_seed_and_size_and_only_when_whole(study, tmp_path, monkeypatch):
    usual = study.rows_file(tmp_path, 3, (100, 1024))
    assert usual == study.rows_file(tmp_path, 3, (study.STEPS, study.TOKENS_PER_STEP))
    assert usual.name == "rows-3-2048000.pickle.xz"
    assert study.rows_file(tmp_path, 3, (2 * study.STEPS, study.TOKENS_PER_STEP)).name == "rows-3-4096000.pickle.xz"
    monkeypatch.setattr("hybridize.data.packing.pack_rows", lambda *args: ["rows"])
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args: None)

    def fail(self, data):
        with self.open("wb") as file:
            file.write(data[:5])
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="full"):
            study.pack(3, usual, 10)
    assert not usual.exists()
    study.pack(3, usual, 10)
    assert study.pickle.loads(study.lzma.decompress(usual.read_bytes())) == ["rows"]

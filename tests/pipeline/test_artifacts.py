"""Artifacts appear whole or not at all, and are known by content."""

import errno
import shutil
from pathlib import Path

import pytest

from hybridize.files import write_whole
from hybridize.pipeline.artifacts import fingerprint_model, make_artifact, read_artifact, writing
from hybridize.spec.base import StoppedError


def make(folder, key="k", work=None, **options):
    def fill(partial):
        write_whole(partial / "result.txt", "good")
        return {"score": 1}

    return make_artifact(folder, kind="test", key=key, spec={}, inputs={}, work=work or fill, **options)


def test_artifact_round_trips_with_its_metrics(tmp_path):
    made = make(tmp_path / "a")
    found = read_artifact(tmp_path / "a", "k")
    assert found.metrics == {"score": 1}
    assert found.digest == made.digest
    assert read_artifact(tmp_path / "a", "another key") is None


def test_artifact_failing_work_leaves_the_old_one_alone(tmp_path):
    make(tmp_path / "a")

    def fail(partial):
        write_whole(partial / "result.txt", "bad")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        make(tmp_path / "a", key="new", work=fail, replace=True)
    assert (tmp_path / "a" / "result.txt").read_text() == "good"
    assert read_artifact(tmp_path / "a", "k") is not None


def test_artifact_resumes_only_leftovers_of_the_same_key(tmp_path):
    seen = []

    def interrupted(partial):
        seen.append(sorted(p.name for p in partial.iterdir() if p.name != "stage.key"))
        (partial / "half").touch()
        raise KeyboardInterrupt

    for key in ("one", "one", "two"):
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "a", key=key, work=interrupted)
    assert seen == [[], ["half"], []]


def test_artifact_refuses_an_existing_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists already and nothing is overwritten"):
        make(tmp_path / "a")
    assert (tmp_path / "a" / "mine.txt").read_text() == "precious"


def test_artifact_never_replaces_what_no_stage_made(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"it has no manifest\.json.*left alone; move it away"):
        make(tmp_path / "a", replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "mine.txt").read_text() == "precious"


def checkpoint_and_stop(partial):
    (partial / "checkpoints").mkdir()
    (partial / "checkpoints" / "1").write_text("hours of work")
    raise KeyboardInterrupt


def test_artifact_of_other_settings_does_not_cost_the_checkpoints(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", key="one", work=checkpoint_and_stop, scratch=["checkpoints"])
    with pytest.raises(ValueError, match=r"\.a\.partial: it holds the unfinished work \(checkpoints\).*remove"):
        make(tmp_path / "a", key="two", scratch=["checkpoints"])
    assert (tmp_path / ".a.partial" / "checkpoints" / "1").read_text() == "hours of work"
    made = make(tmp_path / "a", key="one", scratch=["checkpoints"])
    assert sorted(made.manifest["files"]) == ["result.txt"]
    assert not (tmp_path / "a" / "checkpoints").exists()


@pytest.mark.parametrize("killed_at", ["scratch", "first rename", "second rename"])
def test_artifact_killed_while_it_gets_its_name_is_not_made_again(tmp_path, monkeypatch, killed_at):
    make(tmp_path / "a", key="old")

    def kill(*_, **__):
        raise KeyboardInterrupt

    renamed = Path.rename
    with monkeypatch.context() as patch:
        if killed_at == "scratch":
            patch.setattr(shutil, "rmtree", kill)
        elif killed_at == "first rename":
            patch.setattr(Path, "rename", kill)
        else:
            patch.setattr(Path, "rename", lambda p, to: kill() if ".partial" in p.name else renamed(p, to))

        def work(partial):
            (partial / "checkpoints").mkdir()
            (partial / "checkpoints" / "1").touch()
            write_whole(partial / "result.txt", "new")
            return {"score": 2}

        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "a", key="new", work=work, scratch=["checkpoints"], replace=True)
    assert read_artifact(tmp_path / "a", "new") is None
    made = make(tmp_path / "a", key="new", work=kill, scratch=["checkpoints"], replace=True)
    assert made.metrics == {"score": 2}
    assert (tmp_path / "a" / "result.txt").read_text() == "new"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["manifest.json", "result.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_artifact_that_failed_before_it_made_anything_leaves_nothing(tmp_path):
    def fail(partial):
        (partial / "layers").mkdir()
        raise ValueError("no such teacher")

    with pytest.raises(ValueError, match="no such teacher"):
        make(tmp_path / "a", work=fail, scratch=["layers"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "out: No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), "out/x: Permission denied; make room"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"),
            "out: writing a checkpoint failed",
        ),
    ],
)
def test_writing_names_the_place_the_reason_and_the_remedy(error, message):
    with pytest.raises(StoppedError, match=message), writing(Path("out")):
        raise error


def test_writing_leaves_other_errors_alone():
    for error in (RuntimeError("shapes differ"), OSError("no such repository"), FileNotFoundError(2, "gone", "f")):
        with pytest.raises(type(error)) as caught, writing(Path("out")):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("damage", ["edited", "missing", "manifest"])
def test_artifact_names_what_was_damaged(tmp_path, damage):
    make(tmp_path / "a")
    target = tmp_path / "a" / ("manifest.json" if damage == "manifest" else "result.txt")
    target.unlink() if damage == "missing" else target.write_text("evil")
    with pytest.raises(ValueError, match=rf"{target.name}: .*remove"):
        read_artifact(tmp_path / "a", "k")


def test_fingerprint_changes_with_a_weight(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 3_000_000)
    before = fingerprint_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2_999_999 + b"y")
    assert fingerprint_model(str(tmp_path)) != before
    assert fingerprint_model("owner/name") == "hub:owner/name@"


def test_fingerprint_samples_a_large_file_and_reads_a_whole_one_when_asked(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.truncate(100 << 20)
    sampled, whole = fingerprint_model(tmp_path), fingerprint_model(tmp_path, whole=True)
    with file.open("r+b") as stream:
        stream.seek(50 << 20)
        stream.write(bytes([1]) * (1 << 20))
    assert fingerprint_model(tmp_path) != sampled
    with file.open("r+b") as stream:
        stream.seek(50 << 20)
        stream.write(bytes(1 << 20))
    assert (fingerprint_model(tmp_path), fingerprint_model(tmp_path, whole=True)) == (sampled, whole)


def test_what_a_killed_write_left_is_no_part_of_an_artifact(tmp_path):
    def interrupted(partial):
        write_whole(partial / "result.txt", "good")
        (partial / ".manifest.json.tmp").write_text('{"form')
        return {"score": 1}

    made = make(tmp_path / "a", work=interrupted)
    assert read_artifact(tmp_path / "a", "k").digest == made.digest
    assert sorted(made.manifest["files"]) == ["result.txt"]

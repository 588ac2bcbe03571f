"""Artifacts appear whole or not at all, and are known by content."""

import pytest

from hybridize.pipeline.artifacts import fingerprint_model, make_artifact, read_artifact, write_text


def make(folder, key="k", work=None, **options):
    def fill(partial):
        write_text(partial / "result.txt", "good")
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
        write_text(partial / "result.txt", "bad")
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
    assert fingerprint_model("owner/name") == "hub:owner/name"

"""Records of `bench serve` are read back whatever a killed writer or another tool left beside them."""

import json
from pathlib import Path

import pytest

from hybridize.bench.scenarios import Scenario
from hybridize.bench.serving_job import append_record
from hybridize.bench.serving_records import Speed, read_records, read_speeds

PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "serving" / "records.jsonl"


def published():
    return json.loads(PUBLISHED.read_text().splitlines()[1])


def test_published_records_are_read():
    speeds, notes = read_speeds(PUBLISHED)
    assert not notes
    assert [speed.model for speed in speeds] == ["teacher", "H-40", "H-40-gdn", "H-30", "H-30-gdn"]
    speed = speeds[1]
    assert (speed.scenario, speed.sequences, speed.device) == (Scenario(1, 16384), 147, "NVIDIA H200")
    assert speed.tokens_per_second == sorted(speed.repeats)[1]
    assert (speed.max_sequences, speed.windows) == (None, ())


def test_what_was_asked_tells_settings_apart():
    asked = {"utilization": 0.5, "max_sequences": 64, "step_tokens": 2048, "windows": [None, 512]}
    speed = Speed.of(published() | {"asked": asked})
    assert (speed.utilization, speed.max_sequences, speed.step_tokens) == (0.5, 64, 2048)
    assert speed.windows == (None, 512)


def test_torn_lines_are_named_and_cost_nothing_else(tmp_path):
    file = tmp_path / "serving.jsonl"
    append_record(file, {"model": "a"})
    with file.open("ab") as stream:
        stream.write(b'{"model": "b\xc3')  # killed in the middle of a letter
    append_record(file, {"model": "c"})
    with file.open("a") as stream:
        stream.write('[1]\n\n{"model": "d", "tok')
    records, notes = read_records(file)
    assert [record["model"] for record in records] == ["a", "c"]
    places = [note.partition(":")[0] for note in notes]
    assert places == [f"serving.jsonl, line {line}" for line in (2, 4, 6)]
    assert read_records(tmp_path / "none.jsonl") == ([], [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layout": ...}, "it has no 'layout'"),
        ({"tokens_per_second": 1.0}, "1.0 tokens per second are not within the repeats"),
        ({"tokens_per_second_repeats": []}, "not within the repeats"),
        ({"tokens_per_second": "fast"}, "fast"),
        ({"tokens_per_second": 0.0, "tokens_per_second_repeats": [0.0]}, "not within the repeats"),
        ({"tokens_per_second_repeats": None}, "NoneType"),
        ({"asked": 7}, "int"),
    ],
)
def test_records_that_cannot_be_are_left_out_by_name(tmp_path, change, reason):
    record = {name: value for name, value in (published() | change).items() if value is not ...}
    for entry in (record, published()):
        append_record(tmp_path / "serving.jsonl", entry)
    speeds, (note,) = read_speeds(tmp_path / "serving.jsonl")
    assert [speed.model for speed in speeds] == ["H-40"]
    assert note.startswith("serving.jsonl, record of H-40: ")
    assert reason in note
    assert note.endswith("; left out")

"""The measurement of the loss: who is measured, against which truth, and what is said of those who are missing."""

import importlib

import pytest
import torch

from hybridize.bench import loss as bench
from hybridize.bench.loss import loss_table, measure_loss
from hybridize.losses import KINDS

SMALL = {"num_tokens": 40, "width": 16, "vocabulary": 53, "dtype": torch.float32, "device": "cpu", "repeats": 2}


@pytest.fixture
def only_ours(monkeypatch):
    monkeypatch.setattr(bench, "_BACKENDS", {name: bench._BACKENDS[name] for name in ("hybridize", "dense")})


def test_every_implementation_agrees_or_says_why_it_was_left_out():
    records = measure_loss(**SMALL, kinds=KINDS)
    assert [record["kind"] for record in records] == [kind for kind in KINDS for _ in bench._BACKENDS]
    for record in records:
        if record["backend"] in ("hybridize", "dense", "trl"):
            assert "skipped" not in record, record
        if "skipped" in record:
            assert record["backend"].startswith("liger")
            continue
        assert max(record[f"{name}_error"] for name in ("value", "hidden", "head")) < 1e-5, record
        assert record["forward_ms"] > 0
        assert record["forward_backward_ms"] > 0
        assert record["peak_mib"] is None
    assert len({record["floor_ms"] for record in records}) == 1


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    records = {record["backend"]: record for record in measure_loss(**SMALL)}
    assert "trl" in records["trl"]["skipped"]
    assert "liger_kernel" in records["liger"]["skipped"]
    assert "skipped" not in records["hybridize"]


def test_a_wrong_gradient_shows_in_the_errors(monkeypatch, only_ours):
    def wrong(kind):
        right = bench._hybridize(kind)
        return lambda hidden, head, *rest: right(hidden, 1.01 * head, *rest)

    monkeypatch.setitem(bench._BACKENDS, "dense", wrong)
    ours, other = measure_loss(**SMALL)
    assert ours["head_error"] < 1e-5
    assert other["head_error"] > 1e-3


def test_too_little_memory_is_reported(monkeypatch, only_ours):
    def full(kind):
        def loss(*tensors):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return loss

    monkeypatch.setitem(bench._BACKENDS, "dense", full)
    assert measure_loss(**SMALL)[1]["skipped"] == "out of memory"


def test_the_truth_does_not_depend_on_its_chunks(monkeypatch):
    inputs = bench._draw(40, 16, 53, torch.float32, torch.device("cpu"), 0)
    whole = bench._exact(inputs, "jsd")
    monkeypatch.setattr(bench, "_EXACT_CHUNK_TOKENS", 7)
    torch.testing.assert_close(bench._exact(inputs, "jsd"), whole)


def test_the_table_has_a_row_for_every_record(only_ours):
    records = measure_loss(**SMALL)
    records.append({"kind": "jsd", "backend": "other", "skipped": "not installed"})
    lines = loss_table(records).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "not installed" in lines[-1]


def test_a_size_out_of_range_is_named():
    with pytest.raises(ValueError, match="width: 0 is out of range"):
        measure_loss(**{**SMALL, "width": 0})

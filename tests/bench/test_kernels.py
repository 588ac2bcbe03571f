"""Measuring kernels: what is counted, what is shown."""

from typing import Any

import pytest
import torch

from hybridize.bench import kernels
from hybridize.bench.cases import Case, KernelShape
from hybridize.bench.kernels import KERNEL_OPS, kernels_table, measure_kernels

SMALL = KernelShape(batch=2, length=64, channels=16, states=4, heads=4, groups=2, taps=3, head_dim=4)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    made = measure_kernels(shapes=[SMALL], device="cpu", dtype=torch.float32, repeats=2, on_progress=seen.append)
    assert seen == made
    return made


def test_records_cover_what_a_cpu_has(records: list[dict[str, Any]]) -> None:
    assert [(record["op"], record["backend"]) for record in records] == [
        ("selective_scan", "chunked"),
        ("selective_scan_step", "default"),
        ("causal_conv", "shifted"),
        ("attention", "torch"),
        ("ssd", "chunked"),
        ("ssd_step", "default"),
        ("gated_delta_rule", "chunked"),
        ("gated_delta_rule_step", "default"),
        ("kimi_delta_attention", "chunked"),
        ("kimi_delta_attention_step", "default"),
    ]
    for record in records:
        assert record["forward_ms"] > 0
        assert record["device"] == "cpu"
        assert record["copy_gb_per_s"] > 0
        assert record["peak_mib"] is record["floor_ms"] is None
    assert records[0]["forward_backward_ms"] > records[0]["forward_ms"]
    assert records[1]["forward_backward_ms"] is None


def test_table_has_a_row_per_record(records: list[dict[str, Any]]) -> None:
    lines = kernels_table([*records, records[0] | {"floor_ms": records[0]["forward_ms"] / 2}]).splitlines()
    assert len(lines) == 2 + len(records) + 1
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert lines[2].startswith("| selective_scan | chunked | 2 x 64, D 16, N 4, H 4, G 2 | ")
    assert lines[2].endswith("| - | - | - |")
    assert lines[-1].endswith("| 2.00 |")


def test_floor_is_the_slower_of_bytes_and_exponentials() -> None:
    case = Case(torch.neg, (), read_bytes=600, written_bytes=400, exponentials=50)
    assert kernels._floors(case, 1e6, 1e6) == {"floor_ms": pytest.approx(1.0), "floor_backward_ms": pytest.approx(2.6)}
    assert kernels._floors(case, 1e9, 1e3) == {"floor_ms": pytest.approx(50), "floor_backward_ms": pytest.approx(100)}
    assert kernels._floors(case, 1e6, None) == {"floor_ms": pytest.approx(1.0), "floor_backward_ms": pytest.approx(2.6)}


def test_bytes_of_the_scan_are_its_inputs_and_its_output() -> None:
    case = KERNEL_OPS["selective_scan"]["chunked"](
        SMALL, torch.device("cpu"), torch.bfloat16, torch.Generator().manual_seed(0)
    )
    assert case is not None
    tokens = 2 * 64
    assert case.read_bytes == 2 * tokens * (3 * 16 + 2 * 4 + 4 * 4) + 4 * (16 * 4 + 2 * 16)
    assert case.written_bytes == 2 * tokens * 16
    assert case.exponentials == tokens * 16 * 4


def test_wrong_arguments_are_named_with_their_remedy() -> None:
    with pytest.raises(ValueError, match=r"ops: 'scan' is unknown; use some of selective_scan, "):
        measure_kernels(ops=["scan"])
    with pytest.raises(ValueError, match=r"repeats: 0 is out of range; use at least 1"):
        measure_kernels(repeats=0)

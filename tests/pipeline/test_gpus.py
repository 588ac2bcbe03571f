"""What a machine's GPUs are called, and processes that see one of them."""

import os
import subprocess
import sys

import pytest
import torch

from hybridize.pipeline.gpus import gpu_names, seeing

PRINT = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]


@pytest.mark.parametrize(
    ("count", "seen", "names"),
    [
        (2, None, ("0", "1")),
        (3, "4,2,7", ("4", "2", "7")),
        (2, "GPU-a1, GPU-b2", ("GPU-a1", "GPU-b2")),
        (1, "3,9", ("3",)),  # the driver stops at a name that it does not know
        (0, None, ()),
        (0, "", ()),
        (0, "-1", ()),
    ],
)
def test_names_are_those_of_what_is_visible(monkeypatch, count, seen, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert gpu_names() == names


@pytest.mark.parametrize("before", [None, "4,2"])
@pytest.mark.parametrize("gpu", [None, "2"])
def test_a_process_started_within_sees_one_and_later_ones_all(monkeypatch, before, gpu):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with seeing(gpu):
        within = subprocess.run(PRINT, capture_output=True, text=True, check=True).stdout.strip()
    assert within == str(gpu or before)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before

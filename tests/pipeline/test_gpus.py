"""Processes take turns at the GPUs that they may use."""

import os

import pytest
import torch

from hybridize.pipeline.gpus import take_gpu


@pytest.mark.parametrize(
    ("count", "seen", "turns"),
    [
        (2, None, {0: "0", 1: "1", 2: "0", 5: "1"}),
        (3, "4,2,7", {0: "4", 1: "2", 2: "7", 3: "4"}),
        (2, "GPU-a1, GPU-b2", {0: "GPU-a1", 1: "GPU-b2"}),
    ],
)
def test_turns_go_round_what_is_visible(monkeypatch, count, seen, turns):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for turn, name in turns.items():
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if seen is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        assert take_gpu(turn) == name
        assert os.environ["CUDA_VISIBLE_DEVICES"] == name


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("seen", [None, "3", ""])
def test_nothing_changes_where_there_is_no_choice(monkeypatch, count, seen):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert take_gpu(1) is None
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen

"""Every test of a mixer draws from a new seed, which is shown when the test fails."""

import time

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_but_reported_seed() -> None:
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    print(f"seed {seed}")  # pytest shows it when the test fails

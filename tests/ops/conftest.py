"""Every test of an op draws from a new seed, which is shown when the test fails."""

import time
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("recurrence_checks")


@pytest.fixture(autouse=True)
def _fresh_but_reported_seed(record_property: Any) -> None:
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    record_property("seed", seed)
    print(f"seed {seed}")  # pytest shows it when the test fails

"""Tests of ops draw from a seed of their own, which is shown when they fail."""

import pytest

pytest.register_assert_rewrite("recurrence_checks")


@pytest.fixture(autouse=True)
def _seeded(drawn_seed: int) -> None:
    """Every test here."""

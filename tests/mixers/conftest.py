"""Tests of mixers draw from a seed of their own, which is shown when they fail."""

import pytest


@pytest.fixture(autouse=True)
def _seeded(drawn_seed: int) -> None:
    """Every test here."""

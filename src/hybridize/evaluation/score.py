"""Counts of right answers, as an accuracy with an interval."""

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""The two-sided 95% quantile of the normal distribution."""


@dataclass(frozen=True)
class Score:
    """So many right out of so many.

    Attributes:
        correct: right ones.
        total: all, at least one.
    """

    correct: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total or self.total < 1:
            raise ValueError(
                f"score: {self.correct} of {self.total} is no count; give 0 <= correct <= total, total > 0"
            )

    @property
    def accuracy(self) -> float:
        """Share of right ones, 0..1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% score interval (Wilson 1927), which holds near 0 and 1 too."""
        n, p, z2 = self.total, self.accuracy, Z_95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # Rounding must not push an end past the accuracy, which is one of the ends at 0 and at 1.
        return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))

    def as_dict(self) -> dict[str, float | int]:
        """Plain data for a manifest."""
        low, high = self.interval
        return {
            "correct": self.correct,
            "total": self.total,
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
        }

"""Counts of right answers, as an accuracy with an interval: of one answer to each problem, or of several."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Z_95 = 1.959963984540054
"""The two-sided 95% quantile of the normal distribution."""

_RESAMPLES = 10_000


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


@dataclass(frozen=True)
class PassAtK:
    """Share of problems that at least one of k samples solves, from n >= k samples of each.

    Attributes:
        correct: right samples of each problem.
        samples: n, of each problem.
        k: how many are looked at.
        seed: of the bootstrap.
    """

    correct: tuple[int, ...]
    samples: int
    k: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.samples:
            raise ValueError(f"pass@{self.k}: it takes {self.k} samples or more, not {self.samples}; use 1..samples")
        if not self.correct or not all(0 <= correct <= self.samples for correct in self.correct):
            raise ValueError(
                f"pass@{self.k}: {list(self.correct)[:8]} are no counts of right ones among {self.samples}; "
                f"give at least one, each 0..{self.samples}"
            )

    @cached_property
    def _by_problem(self) -> np.ndarray:
        """1 - C(n-c, k) / C(n, k) of each problem, unbiased (Chen et al., arXiv 2107.03374, eq. 1)."""
        n, k = self.samples, self.k
        of_count = [1 - math.comb(n - correct, k) / math.comb(n, k) for correct in range(n + 1)]
        return np.asarray(of_count)[list(self.correct)]

    @property
    def accuracy(self) -> float:
        """The unbiased estimate, 0..1."""
        return float(self._by_problem.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% percentile interval of a bootstrap over problems (Efron 1979).

        Problems are drawn anew, with all their samples: these are not independent of one another. Where all problems
        have the same value the bootstrap knows no spread; there the interval is Wilson's for as many problems.
        """
        by_problem = self._by_problem
        size = len(by_problem)
        if np.ptp(by_problem) == 0:
            low, high = Score(round(size * self.accuracy), size).interval
            return min(low, self.accuracy), max(high, self.accuracy)
        values, counts = np.unique(by_problem, return_counts=True)
        # To draw problems with replacement is to draw how often each value comes: little memory however many problems.
        rng = np.random.default_rng(self.seed)
        means = rng.multinomial(size, counts / size, _RESAMPLES) @ values / size
        low, high = np.quantile(means, [0.025, 0.975]).tolist()
        return low, high

    def as_dict(self) -> dict[str, float]:
        """Plain data for a manifest."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "low": low, "high": high}

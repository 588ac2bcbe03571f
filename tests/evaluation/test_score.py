from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.evaluation import PassAtK, Score

# Wilson's 95% interval without continuity correction; the first two are Newcombe's (1998, table I, method 3).
KNOWN = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (29, 29, 0.8830, 1.0),
    (5, 10, 0.2366, 0.7634),
    (1, 1, 0.2065, 1.0),
]


@pytest.mark.parametrize(("correct", "total", "low", "high"), KNOWN)
def test_intervals_are_wilsons(correct, total, low, high):
    assert Score(correct, total).interval == pytest.approx((low, high), abs=6e-5)


@settings(deadline=None, derandomize=True)
@given(data=st.data(), total=st.integers(1, 5000))
def test_an_interval_holds_the_accuracy_and_mirrors(data, total):
    correct = data.draw(st.integers(0, total))
    score = Score(correct, total)
    low, high = score.interval
    assert 0 <= low <= score.accuracy <= high <= 1
    assert low < high
    mirrored = Score(total - correct, total).interval
    assert (1 - high, 1 - low) == pytest.approx(mirrored)
    wider = Score(10 * correct, 10 * total).interval
    assert wider[1] - wider[0] < high - low


@pytest.mark.parametrize(("correct", "total"), [(-1, 3), (4, 3), (0, 0), (0, -1)])
def test_counts_that_are_none_are_refused(correct, total):
    with pytest.raises(ValueError, match=rf"score: {correct} of {total} is no count; give 0 <= correct <= total"):
        Score(correct, total)


def test_none_and_all_right_end_the_interval_exactly():
    for total in range(1, 500):
        assert Score(0, total).interval[0] == 0
        assert Score(total, total).interval[1] == 1


def test_plain_data_has_both_ends():
    assert Score(5, 10).as_dict() == pytest.approx(
        {"correct": 5, "total": 10, "accuracy": 0.5, "low": 0.2366, "high": 0.7634}, abs=6e-5
    )


def naive_pass_at_k(correct, samples, k):
    """Over all ways of choosing k samples, how often one of them is right."""
    chosen = list(combinations([True] * correct + [False] * (samples - correct), k))
    return sum(map(any, chosen)) / len(chosen)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(samples):
    for k in range(1, samples + 1):
        counts = range(samples + 1)
        for correct in counts:
            estimate = PassAtK((correct,), samples, k).accuracy
            assert estimate == pytest.approx(naive_pass_at_k(correct, samples, k))
        expected = np.mean([naive_pass_at_k(correct, samples, k) for correct in counts])
        assert PassAtK(tuple(counts), samples, k).accuracy == pytest.approx(expected)


def test_pass_at_k_of_known_values():
    counts = (0, 3, 10, 1)
    assert PassAtK(counts, 10, 1).accuracy == pytest.approx(14 / 40)  # the mean of c / n
    assert PassAtK(counts, 10, 10).accuracy == pytest.approx(3 / 4)  # any right one
    assert PassAtK((200,), 1000, 100).accuracy == pytest.approx(1 - 1.1e-10, abs=1e-9)  # no overflow


def test_bootstrap_interval_covers_as_often_as_it_says():
    """Problems of very different difficulty, a few samples each: the true mean is inside about 95 times in 100."""
    rng = np.random.default_rng(0)
    inside, wilson_inside, truth = 0, 0, 0.5  # of a uniform difficulty
    for trial in range(120):
        counts = rng.binomial(8, rng.uniform(size=60))
        low, high = PassAtK(tuple(counts.tolist()), 8, 1, seed=trial).interval
        inside += low <= truth <= high
        low, high = Score(int(counts.sum()), 480).interval
        wilson_inside += low <= truth <= high
    assert 0.89 <= inside / 120 <= 0.99
    assert wilson_inside / 120 < 0.8  # taking all samples for independent is too sure of itself


def test_bootstrap_is_seeded_and_narrows():
    counts = (0, 1, 2, 3, 4) * 4
    assert PassAtK(counts, 4, 1).interval == PassAtK(counts, 4, 1).interval
    assert PassAtK(counts * 16, 4, 1).interval != PassAtK(counts * 16, 4, 1, seed=1).interval
    low, high = PassAtK(counts, 4, 1).interval
    more_low, more_high = PassAtK(counts * 16, 4, 1).interval
    assert low < more_low < 0.5 < more_high < high
    assert (high - low) / (more_high - more_low) == pytest.approx(4, rel=0.1)


def test_interval_of_equal_problems_is_no_point():
    assert PassAtK((4,) * 20, 4, 4).interval == pytest.approx(Score(20, 20).interval)
    assert PassAtK((0,) * 20, 4, 1).interval == pytest.approx(Score(0, 20).interval)
    low, high = PassAtK((2,) * 20, 4, 1).interval
    assert low < 0.5 < high


@pytest.mark.parametrize(
    ("correct", "samples", "k", "message"),
    [
        ((1,), 4, 5, "pass@5: it takes 5 samples or more, not 4"),
        ((1,), 4, 0, "pass@0"),
        ((5,), 4, 1, r"pass@1: \[5\] are no counts of right ones among 4; give at least one, each 0..4"),
        ((), 4, 1, r"pass@1: \[\] are no counts"),
    ],
)
def test_counts_and_k_that_do_not_fit_are_refused(correct, samples, k, message):
    with pytest.raises(ValueError, match=message):
        PassAtK(correct, samples, k)

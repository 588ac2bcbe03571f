import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.evaluation import Score

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

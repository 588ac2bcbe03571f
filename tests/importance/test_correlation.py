"""Spearman's correlation against its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_example import ranking_of

from hybridize.importance import LayerOrder, rank_correlation


def test_agreement_is_one_and_reversal_minus_one():
    scores = {0: 0.5, 1: 0.1, 2: 0.3, 3: 9.0}
    same, reverse = {k: v**3 for k, v in scores.items()}, {k: -v for k, v in scores.items()}
    assert rank_correlation(ranking_of(scores), ranking_of(same)) == pytest.approx(1)
    assert rank_correlation(ranking_of(scores), ranking_of(reverse)) == pytest.approx(-1)


def test_a_known_value_without_ties():
    a, b = dict(enumerate([1.0, 2.0, 3.0, 4.0, 5.0])), dict(enumerate([5.0, 6.0, 7.0, 8.0, 7.5]))
    assert rank_correlation(ranking_of(a), ranking_of(b)) == pytest.approx(1 - 6 * 2 / (5 * 24))


def test_layers_of_equal_score_share_their_rank():
    """Ranks 1.5, 1.5, 3, 4 and 1, 2, 3.5, 3.5: covariance 4 over variances 4.5 and 4.5."""
    a, b = {0: 1.0, 1: 1.0, 2: 2.0, 3: 3.0}, {0: 1.0, 1: 2.0, 2: 5.0, 3: 5.0}
    assert rank_correlation(ranking_of(a), ranking_of(b)) == pytest.approx(4 / 4.5)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=6))
def test_it_is_pearson_of_mean_ranks(pairs):
    columns = list(zip(*pairs, strict=True))
    a, b = (dict(enumerate(map(float, column))) for column in columns)
    ranks = [[np.mean([i for i, w in enumerate(sorted(c)) if w == v]) for v in c] for c in columns]
    if any(len(set(c)) == 1 for c in columns):
        with pytest.raises(ValueError, match="all have one score; nothing to compare"):
            rank_correlation(ranking_of(a), ranking_of(b))
        return
    expected = float(np.corrcoef(ranks)[0, 1])
    assert rank_correlation(ranking_of(a), ranking_of(b)) == pytest.approx(expected, abs=1e-9)
    assert -1 <= rank_correlation(ranking_of(b), ranking_of(a)) <= 1


def test_only_common_layers_count():
    whole, hybrid = {0: 9.0, 1: 1.0, 2: 2.0, 3: 3.0}, {1: 5.0, 2: 6.0, 3: 7.0}
    assert rank_correlation(ranking_of(whole), ranking_of(hybrid)) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"have layers \[1\] in common; compare rankings of one model"):
        rank_correlation(ranking_of({0: 1.0, 1: 2.0}), ranking_of({1: 1.0, 2: 2.0}))


def test_a_control_is_ranked_by_its_order_or_not_at_all():
    ranking = ranking_of({0: 1.0, 1: 2.0, 2: 3.0})
    assert rank_correlation(ranking, LayerOrder("random", (0, 1, 2), (2, 1, 0))) == pytest.approx(-1)
    with pytest.raises(ValueError, match="ranking uniform: it has no order, only choices"):
        rank_correlation(ranking, ranking.controls["uniform"])

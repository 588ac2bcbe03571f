"""How far two rankings agree."""

from hybridize.importance.ranking import LayerOrder, Ranking


def rank_correlation(a: LayerOrder, b: LayerOrder) -> float:
    """Spearman's rank correlation of two rankings over the layers that both rank.

    Layers of equal score share the mean of their ranks, so the result is Pearson's correlation of the ranks. A control
    that is an order without scores, such as the random one, is ranked by its order.

    Args:
        a: a ranking, or a control with an order.
        b: another.

    Returns:
        From -1, one order is the other's reverse, to 1, they agree.

    Raises:
        ValueError: fewer than two layers are ranked by both, a ranking has no order (the uniform control), or all
            its scores are equal.
    """
    import numpy as np

    common = sorted(set(a.layers) & set(b.layers))
    if len(common) < 2:
        raise ValueError(
            f"rankings {a.method} and {b.method}: they have layers {common} in common; compare rankings of one model"
        )
    ranks = []
    for ranking in (a, b):
        values = np.array(_values(ranking, common))
        below, up_to = (values[:, None] > values).sum(1), (values[:, None] >= values).sum(1)
        mean_ranks = (below + up_to + 1) / 2
        ranks.append(mean_ranks - mean_ranks.mean())
        if not ranks[-1].any():
            raise ValueError(f"ranking {ranking.method}: the layers {common} all have one score; nothing to compare")
    x, y = ranks
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _values(ranking: LayerOrder, layers: list[int]) -> list[float]:
    if isinstance(ranking, Ranking) and ranking.scores is not None:
        return [ranking.scores[layer] for layer in layers]
    if ranking.order is None:
        raise ValueError(f"ranking {ranking.method}: it has no order, only choices; compare another")
    return [ranking.order.index(layer) for layer in layers]

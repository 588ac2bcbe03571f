"""From rankings, one for each mixer, to what a layer of each kind adds to the loss: comparable, or refused."""

from collections.abc import Mapping, Sequence
from typing import Any

from hybridize.importance.ranking import Ranking

METHODS_FOR_SEARCH = ("mmr", "perplexity")
"""Methods whose score of a layer is a loss with that layer's attention swapped for the mixer."""

_SAME = {
    "model": "the same layers",
    "sweep": "the same sweep",
    "steps": "as many steps",
    "tokens_per_step": "steps of as many tokens",
    "sequence_length": "rows of the same length",
    "heldout_rows": "as many held-out rows",
    "seed": "the same seed",
    "data": "the same data",
    "init": "the same init, since a layout is converted with one",
}
"""Settings that must agree, and what they stand for. The learning rate may be each mixer's own."""

_SAME_BASELINE = 1e-2
"""By how much the loss of the untouched model may differ, relative: rounding on different hardware."""


def increases_of(rankings: Mapping[str, Ranking]) -> list[tuple[float, ...]]:
    """By how much the loss rises, in nat per token, when a layer becomes a mixer.

    For `mmr` that is the score itself, the divergence from the teacher with the layer swapped and briefly trained,
    since the untouched model is the teacher. For `perplexity` it is the score less the baseline, and can be negative:
    the loss on so few rows can fall when a layer is replaced.

    Args:
        rankings: by their names, for errors; each of another mixer.

    Returns:
        For each ranking, in their order, one number a layer.

    Raises:
        ValueError: there is none, one does not measure what a mixer costs, or they do not compare: another method,
            other layers, rows or settings, or one mixer twice. Names the ranking, the value and the remedy.
    """
    if not rankings:
        raise ValueError("rankings: none is given; give one for each mixer that a layer may become")
    (first_name, first), *others = rankings.items()
    for name, ranking in rankings.items():
        _check_alone(name, ranking)
    for name, ranking in others:
        _check_pair(name, ranking, first_name, first)
    seen: dict[str, str] = {}
    for name, ranking in rankings.items():
        mixer = str(sorted(ranking.mixer.model_dump(mode="json").items()))
        if mixer in seen:
            raise ValueError(f"{name}: it ranks for the same {ranking.mixer.type} as {seen[mixer]}; leave one out")
        seen[mixer] = name
    return [_increases(ranking) for ranking in rankings.values()]


def _increases(ranking: Ranking) -> tuple[float, ...]:
    assert ranking.scores is not None
    return tuple(ranking.scores[layer] - (ranking.baseline or 0.0) for layer in ranking.layers)


def _check_alone(name: str, ranking: Ranking) -> None:
    if ranking.method not in METHODS_FOR_SEARCH or ranking.scores is None:
        raise ValueError(
            f"{name}: method {ranking.method} does not say what the loss is when a layer becomes {ranking.mixer.type}; "
            f"rank by {' or '.join(METHODS_FOR_SEARCH)}"
        )
    if len(ranking.layers) != ranking.num_layers:
        raise ValueError(
            f"{name}: it ranks {len(ranking.layers)} of {ranking.num_layers} layers, those that a hybrid has left; "
            "rank the teacher, model: teacher"
        )


def _check_pair(name: str, ranking: Ranking, first_name: str, first: Ranking) -> None:
    """Raise a `ValueError` if the scores of two rankings do not compare."""
    for what, mine, its in (
        ("method", ranking.method, first.method),
        ("unit", ranking.unit, first.unit),
        ("num_layers", ranking.num_layers, first.num_layers),
    ):
        if mine != its:
            raise ValueError(f"{name}: its {what} is {mine}, but that of {first_name} is {its}; rank both alike")
    for field, meaning in _SAME.items():
        own, other = ranking.settings.get(field), first.settings.get(field)
        if own != other:
            raise ValueError(
                f"{name}: its {field} is {own}, but that of {first_name} is {other}, and scores compare only over "
                f"{meaning}; rank again with {field}: {other}"
            )
    for field in ("teacher", "data"):
        prints = [each.settings.get(f"{field}_print") for each in (ranking, first)]
        if None not in prints and prints[0] != prints[1]:
            raise ValueError(
                f"{name}: it was made from another {field} than {first_name}, so their scores do not compare; rank "
                f"both with the same {field}"
            )
    loss, other = ranking.baseline, first.baseline
    if loss is not None and other is not None and abs(loss - other) > _SAME_BASELINE * max(abs(loss), abs(other)):
        raise ValueError(
            f"{name}: the loss of the untouched model is {loss:g}, but {other:g} in {first_name}, so the rows or the "
            "models differ; rank both with the same teacher and data"
        )


def letters_of(mixers: Sequence[Any]) -> list[str]:
    """A letter for each mixer, by which a layout is written: its kind's own, or else one that is free."""
    taken = {"a"}
    letters = []
    for mixer in mixers:
        options = (mixer.letter, *"bcdefhjlnopqrtuvwxyz")
        letters.append(next(letter for letter in options if letter not in taken))
        taken.add(letters[-1])
    return letters

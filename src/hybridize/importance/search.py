"""Which mixer for which layer: the least loss at every cost, for layouts that mix several kinds.

Given what the loss rises by when one layer becomes one mixer, for every layer and mixer, a layout's predicted loss is
the sum over its layers. Nothing says that the increases add up: two layers that replace each other's work cost more
together than apart, and layers are trained together later. So a prediction orders layouts, roughly; it measures none.
And the least of several noisy scores is lower than it should be, the more so the more mixers there are to choose from:
a mixture's predicted lead is flattered, and its worth is what a later stage measures. On the pocket teacher the sum of
untrained scores was 20 to 150 times below what converted layouts lost, three of six mixtures that were predicted to
lead did, and after distillation a gated delta net alone was better than the mixtures (docs/LOG.md).

What a layout costs depends on how many layers are of which kind only, whichever they are. So for every such set of
counts the layout of the least loss is found by dynamic programming over the layers, and then any function of the counts
can be the cost: bytes that a step moves, or seconds that a server is predicted to take. That is exact. Beyond
`EXACT_CELLS` numbers a greedy descent stands in for it: the one change that loses least for what it saves, again and
again.

Legend: M mixers; K one more, attention first; L layers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from hybridize.spec.cache_groups import group_layers
from hybridize.spec.mixers import AttentionSpec, IdentitySpec, MixerSpec, SlidingWindowSpec

EXACT_CELLS = 50_000_000
"""Up to so many numbers, one byte each, the dynamic programme keeps: 16 layers and 5 mixers, or 50 layers and 3."""

Cost = Callable[[Sequence[int]], float]
"""Takes how many layers are attention, and how many are each mixer, in their order; infinite: it cannot be run."""

Increases = Sequence[Sequence[float]]
"""Of each mixer: by how much the loss rises when a layer becomes that mixer; may be negative."""


@dataclass(frozen=True)
class Point:
    """A layout with what is predicted of it.

    Attributes:
        choice: of each layer, from the bottom up: 0 for attention, i for the i-th mixer.
        loss: sum of the increases of its layers.
        cost: what the cost function says.
        groups: kinds' groups in vLLM's cache, see `kv_groups`.
    """

    choice: tuple[int, ...]
    loss: float
    cost: float
    groups: int

    @property
    def num_replaced(self) -> int:
        """Layers that are not attention."""
        return sum(kind != 0 for kind in self.choice)

    @property
    def is_mixture(self) -> bool:
        """Whether layers became more than one kind of mixer."""
        return len({kind for kind in self.choice if kind}) > 1


class Search:
    """All layouts worth looking at, and the choices among them.

    Args:
        mixers: what a layer can become, beside staying attention.
        increases: of each mixer, one number a layer.
        cost: of a layout, by its counts.
        max_groups: leave out layouts that vLLM's cache would be cut into more groups for; by default none are.
        exact_cells: see `EXACT_CELLS`.

    Attributes:
        exact: whether the layout of the least loss was found for every set of counts.
        points: the best layout of each set of counts that is allowed; where the search is greedy, those on its way and
            the best of each single mixer.
        teacher: nothing replaced.

    Raises:
        ValueError: no mixers, increases that do not fit them, or a teacher that cannot run.
    """

    def __init__(
        self,
        mixers: Sequence[MixerSpec],
        increases: Increases,
        cost: Cost,
        *,
        max_groups: int | None = None,
        exact_cells: int = EXACT_CELLS,
    ) -> None:
        sizes = {len(row) for row in increases}
        if not mixers or len(increases) != len(mixers) or len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                f"increases: rows of {sorted(sizes)} numbers for {len(mixers)} mixers; give each mixer one number for "
                "each layer"
            )
        self.mixers, self.increases, self.cost = tuple(mixers), [tuple(row) for row in increases], cost
        self.num_layers = sizes.pop()
        self.exact = self.num_layers * (self.num_layers + 1) ** len(mixers) <= exact_cells
        self.teacher = self.point((0,) * self.num_layers)
        if not isfinite(self.teacher.cost):
            raise ValueError("cost: that of the teacher is infinite; reckon for shorter sequences or a larger GPU")
        if self.exact:
            found: Iterable[tuple[int, ...]] = best_of_counts(self.increases)
        else:
            singles = [point.choice for m in range(len(mixers)) for point in self.single(m)]
            found = dict.fromkeys([*_descend(self.increases, cost), *singles])
        points = (self.point(choice) for choice in found)
        self.points = [
            p
            for p in points
            if isfinite(p.cost) and (max_groups is None or p.groups <= max_groups or not p.num_replaced)
        ]

    def point(self, choice: tuple[int, ...]) -> Point:
        """A layout with its predictions."""
        counts = [choice.count(kind) for kind in range(len(self.mixers) + 1)]
        loss = sum(self.increases[kind - 1][layer] for layer, kind in enumerate(choice) if kind)
        return Point(choice, loss, self.cost(counts), kv_groups(counts, self.mixers))

    def single(self, mixer: int) -> list[Point]:
        """One mixer alone, in the layers where it costs least: in none, in one, and so on; whatever the groups."""
        row = self.increases[mixer]
        order = sorted(range(self.num_layers), key=lambda layer: (row[layer], layer))
        return [self._with(mixer, order[:count]) for count in range(self.num_layers + 1)]

    def uniform(self, mixer: int) -> list[Point]:
        """One mixer alone, in evenly spaced layers, as the `uniform` ranking has them."""
        size = self.num_layers
        return [self._with(mixer, [(2 * i + 1) * size // (2 * n) for i in range(n)]) for n in range(size + 1)]

    def _with(self, mixer: int, layers: Iterable[int]) -> Point:
        chosen = set(layers)
        return self.point(tuple(mixer + 1 if layer in chosen else 0 for layer in range(self.num_layers)))

    def choose(self, *, max_cost: float | None = None, num_layers: int | None = None) -> Point | None:
        """The layout of the least loss that costs no more and has as many layers replaced; None if there is none.

        Of equal losses the cheaper one counts.
        """
        allowed = [
            point
            for point in self.points
            if (max_cost is None or point.cost <= max_cost * (1 + 1e-9))
            and (num_layers is None or point.num_replaced == num_layers)
        ]
        return min(allowed, key=lambda point: (point.loss, point.cost), default=None)


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats in cost and loss, from the cheapest upwards; of equal ones the first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def lead(points: Sequence[Point], others: Sequence[Point]) -> list[float]:
    """By how much the best loss of `points` is lower than that of `others`, at the same or at a lower cost.

    Returns:
        A number for each cost at which one of the two frontiers has a layout and both have one as cheap, from the
        cheapest upwards: positive where `points` are better.
    """
    mine, theirs = frontier(points), frontier(others)
    leads = []
    for limit in sorted({point.cost for point in (*mine, *theirs)}):
        losses = [[p.loss for p in line if p.cost <= limit * (1 + 1e-9)] for line in (mine, theirs)]
        if all(losses):
            leads.append(min(losses[1]) - min(losses[0]))
    return leads


def kv_groups(counts: Sequence[int], mixers: Sequence[MixerSpec]) -> int:
    """Groups that vLLM's cache is cut into: each is worked on at every step.

    Layers are of three kinds: attention, windows of one length, mixers with a state; `identity` keeps nothing. How they
    are cut: `hybridize.spec.cache_groups`.

    Args:
        counts: layers that are attention, then those of each mixer.
        mixers: the same mixers.
    """
    kinds: dict[object, int] = {}
    for spec, count in zip((AttentionSpec(), *mixers), counts, strict=True):
        if not isinstance(spec, IdentitySpec):
            is_attention = isinstance(spec, AttentionSpec)
            kind = None if is_attention else spec.window if isinstance(spec, SlidingWindowSpec) else "state"
            kinds[kind] = kinds.get(kind, 0) + count
    return sum(group_layers(kinds)[1].values())


def best_of_counts(increases: Increases) -> Iterator[tuple[int, ...]]:
    """The choice of the least loss for every set of counts, by dynamic programming over the layers.

    Of equal ones, upper layers stay attention.
    """
    import numpy as np

    num_layers, num_mixers = len(increases[0]), len(increases)
    best = np.full((num_layers + 1,) * num_mixers, np.inf)
    best[(0,) * num_mixers] = 0.0
    picks: list[Any] = []
    for layer in range(num_layers):
        new, pick = best.copy(), np.zeros(best.shape, dtype=np.uint8)
        for m in range(num_mixers):
            to = tuple(slice(1, None) if axis == m else slice(None) for axis in range(num_mixers))
            of = tuple(slice(None, -1) if axis == m else slice(None) for axis in range(num_mixers))
            swapped = best[of] + increases[m][layer]
            better = swapped < new[to]
            new[to][better] = swapped[better]
            pick[to][better] = m + 1
        best = new
        picks.append(pick)
    for counts in np.argwhere(np.isfinite(best)).tolist():
        choice = []
        for pick in reversed(picks):
            kind = int(pick[tuple(counts)])
            choice.append(kind)
            if kind:
                counts[kind - 1] -= 1
        yield tuple(reversed(choice))


def _descend(increases: Increases, cost: Cost) -> Iterator[tuple[int, ...]]:
    """From attention everywhere: the change of one layer that loses least for the cost it saves, until none saves."""
    rows = [(0.0,) * len(increases[0]), *increases]
    choice = [0] * len(rows[0])
    counts = [len(choice)] + [0] * len(increases)
    while True:
        yield tuple(choice)
        now = cost(counts)
        moves = []
        for old in (kind for kind, count in enumerate(counts) if count):
            layers = [layer for layer, kind in enumerate(choice) if kind == old]
            for new in (kind for kind in range(len(rows)) if kind != old):
                saved = now - cost([count + (kind == new) - (kind == old) for kind, count in enumerate(counts)])
                if saved > 0:
                    loss, layer = min((rows[new][layer] - rows[old][layer], layer) for layer in layers)
                    moves.append((loss / saved, layer, new))
        if not moves:
            return
        _, layer, new = min(moves)
        counts[choice[layer]] -= 1
        counts[new] += 1
        choice[layer] = new

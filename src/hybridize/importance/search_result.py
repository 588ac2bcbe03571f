"""What a search finds, and the file that holds it: the chosen layout, the frontier, and the controls beside it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Self

from hybridize.importance.ranking import Ranking, write_json
from hybridize.importance.search import Cost, Point, Search, frontier, lead
from hybridize.importance.search_rankings import increases_of, letters_of
from hybridize.spec import LayoutSpec, MixerSpec, parse_mixer

FORMAT = "hybridize.search/1"
"""The `format` of a search's file."""

ANY = "any"
"""What stands in `leads` for the best of all single mixers."""


@dataclass(frozen=True)
class FoundLayout:
    """A layout with its predictions.

    Attributes:
        layout: one letter a layer.
        loss: predicted increase, nat per token: the sum over the layers.
        cost: predicted, in the search's `cost_unit`.
        speedup: the teacher's cost over this one's.
        groups: in vLLM's cache.
        num_replaced: layers that are not attention.
    """

    layout: str
    loss: float
    cost: float
    speedup: float
    groups: int
    num_replaced: int


@dataclass(frozen=True)
class SearchResult:
    """A search's outcome.

    Attributes:
        chosen: the layout that meets the target with the least predicted loss.
        blocks: what the letters of the layouts stand for, sizes filled in; `a` is the teacher's attention.
        frontier: layouts that no other one beats in loss and cost, from the cheapest upwards.
        controls: layouts of a single mixer, by `<letter>` in the best layers and `<letter>/uniform` in evenly spaced
            ones; for none, one, two layers, and so on.
        leads: by the letter of each mixer: by how much the best layout of all is lower in predicted loss than the best
            of that mixer alone that costs no more, at each cost where either frontier has a layout, from the cheapest
            upwards; 0 is no better. Under `any`, the same for all single mixers together.
        exact: whether every set of counts was looked at.
        method: of the rankings.
        unit: of the losses.
        cost_unit: of the costs, with what they are reckoned for.
        target: what was asked for, and the `init` that the rankings were made with; plain data.
    """

    chosen: FoundLayout
    blocks: Mapping[str, MixerSpec]
    frontier: tuple[FoundLayout, ...]
    controls: Mapping[str, tuple[FoundLayout, ...]]
    leads: Mapping[str, tuple[float, ...]]
    exact: bool
    method: str
    unit: str
    cost_unit: str
    target: Mapping[str, Any]

    @property
    def layout(self) -> LayoutSpec:
        """The chosen layout."""
        word = self.chosen.layout
        return LayoutSpec.read(word, {letter: spec for letter, spec in self.blocks.items() if letter in word})

    @property
    def verdict(self) -> str:
        """In a sentence: whether mixtures are predicted to beat the best single mixer."""
        gains = self.leads[ANY]
        if len(self.blocks) < 2:
            return "One mixer only: nothing to mix."
        better = sum(gain > 1e-9 for gain in gains)
        if not better:
            return f"No mixture is predicted to beat the best single mixer at any of {len(gains)} costs."
        return (
            f"Mixtures are predicted to beat the best single mixer at {better} of {len(gains)} costs, by up to "
            f"{max(gains):.4g} {self.unit}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the format's tag."""
        return {
            "format": FORMAT,
            "chosen": asdict(self.chosen),
            "blocks": {letter: spec.model_dump(mode="json") for letter, spec in self.blocks.items()},
            "frontier": [asdict(found) for found in self.frontier],
            "controls": {name: [asdict(found) for found in points] for name, points in self.controls.items()},
            "leads": {letter: list(gains) for letter, gains in self.leads.items()},
            "verdict": self.verdict,
            "exact": self.exact,
            "method": self.method,
            "unit": self.unit,
            "cost_unit": self.cost_unit,
            "target": dict(self.target),
        }

    @classmethod
    def from_dict(cls, value: Any, place: str) -> Self:
        """Read what `as_dict` wrote.

        Raises:
            ValueError: it is another format, or damaged.
        """
        tag = value.get("format") if isinstance(value, dict) else None
        if tag != FORMAT:
            raise ValueError(f"{place}: format: {tag!r} is not {FORMAT!r}; run the search again")
        try:
            return cls(
                chosen=FoundLayout(**value["chosen"]),
                blocks={letter: parse_mixer(spec) for letter, spec in value["blocks"].items()},
                frontier=tuple(FoundLayout(**found) for found in value["frontier"]),
                controls={
                    name: tuple(FoundLayout(**found) for found in points) for name, points in value["controls"].items()
                },
                leads={letter: tuple(gains) for letter, gains in value["leads"].items()},
                **{name: value[name] for name in ("exact", "method", "unit", "cost_unit", "target")},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{place}: it is damaged ({error}); run the search again") from None


def search_layout(
    rankings: Mapping[str, Ranking],
    cost: Cost,
    *,
    cost_unit: str,
    speedup: float | None = None,
    num_layers: int | None = None,
    max_groups: int | None = None,
) -> SearchResult:
    """Choose a mixer for each layer.

    Args:
        rankings: one for each mixer, by name; see `increases_of` for what makes them compare.
        cost: of counts of layers: attention, then each ranking's mixer.
        cost_unit: what it is measured in and reckoned for, in words.
        speedup: the teacher's cost over the layout's must be at least this; by default anything goes.
        num_layers: exactly so many layers are replaced; by default as many as the cost asks for.
        max_groups: of vLLM's cache, at most; by default any number.

    Returns:
        The layout of the least predicted loss, with the frontier and its controls.

    Raises:
        ValueError: the rankings do not compare, or no layout meets the target.
    """
    mixers = [ranking.mixer for ranking in rankings.values()]
    increases = increases_of(rankings)
    letters = letters_of(mixers)
    first = next(iter(rankings.values()))
    if num_layers is not None and not 1 <= num_layers <= first.num_layers:
        raise ValueError(f"num_layers: {num_layers} is out of range; the model has {first.num_layers} layers")
    search = Search(mixers, increases, cost, max_groups=max_groups)
    limit = None if speedup is None else search.teacher.cost / speedup
    chosen = search.choose(max_cost=limit, num_layers=num_layers)
    if chosen is None:
        raise ValueError(_explain(search, speedup, num_layers, max_groups))
    word = "a" + "".join(letters)

    def shown(point: Point) -> FoundLayout:
        return FoundLayout(
            layout="".join(word[kind] for kind in point.choice),
            loss=point.loss,
            cost=point.cost,
            speedup=search.teacher.cost / point.cost if point.cost else float(len(point.choice)),
            groups=point.groups,
            num_replaced=point.num_replaced,
        )

    singles = {letter: search.single(i) for i, letter in enumerate(letters)}
    uniform = {f"{letter}/uniform": search.uniform(i) for i, letter in enumerate(letters)}
    # Where groups are limited, they are for the controls that mixtures are compared with.
    fair = {
        letter: [p for p in points if isfinite(p.cost) and (max_groups is None or p.groups <= max_groups)]
        for letter, points in singles.items()
    }
    fair[ANY] = [point for points in fair.values() for point in points]
    leads = {name: tuple(lead(search.points, points)) for name, points in fair.items()}
    return SearchResult(
        chosen=shown(chosen),
        blocks=dict(zip(letters, mixers, strict=True)),
        frontier=tuple(map(shown, frontier(search.points))),
        controls={
            name: tuple(shown(point) for point in points if isfinite(point.cost))
            for name, points in (singles | uniform).items()
        },
        leads=leads,
        exact=search.exact,
        method=first.method,
        unit=first.unit,
        cost_unit=cost_unit,
        target={"speedup": speedup, "num_layers": num_layers, "max_groups": max_groups}
        | ({"init": first.settings["init"]} if "init" in first.settings else {}),
    )


def _explain(search: Search, speedup: float | None, num_layers: int | None, max_groups: int | None) -> str:
    """What cannot be reached, and what can."""
    rest = f" in at most {max_groups} groups" if max_groups is not None else ""
    counts: Sequence[Point] = [p for p in search.points if num_layers in (None, p.num_replaced)]
    if not counts:
        return f"num_layers: no layout has {num_layers} layers replaced{rest}; use another number, or more groups"
    cheapest = min(point.cost for point in counts)
    best = search.teacher.cost / cheapest if cheapest else float("inf")
    among = f" with {num_layers} layers replaced" if num_layers else ""
    return f"speedup: {speedup:g} is out of reach{among}{rest}; the most is {best:.3g}"


def save_search(result: SearchResult, path: str | Path) -> Path:
    """Write a search's outcome as JSON; the file appears whole or not at all."""
    write_json(Path(path), result.as_dict())
    return Path(path)


def load_search(path: str | Path) -> SearchResult:
    """Read a search's file.

    Raises:
        ValueError: the file is missing or damaged; names it and the remedy.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"search {path}: cannot be read ({error.strerror}); check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"search {path}: is not JSON ({error}); run the search again") from None
    return SearchResult.from_dict(value, f"search {path}")

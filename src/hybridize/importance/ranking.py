"""What a scorer says: layers from the least important to the most, never without the controls."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hybridize.files import write_whole
from hybridize.spec import MixerSpec, parse_mixer

FORMAT = "hybridize.ranking/1"
"""The `format` of a ranking file."""

NAT_PER_TOKEN = "nat/token"
ACCURACY_LOST = "accuracy lost"


@dataclass(frozen=True)
class LayerOrder:
    """A rule that says which layers to replace, for any number of them.

    Attributes:
        method: who says so, e.g. `mmr`.
        layers: the layers that can be chosen, ascending: those that were attention.
        order: the same layers, least important first; None: evenly spaced ones are chosen, which no order can
            express, since the layers chosen among 4 need not be among those chosen among 8.
    """

    method: str
    layers: tuple[int, ...]
    order: tuple[int, ...] | None

    def __post_init__(self) -> None:
        if list(self.layers) != sorted(set(self.layers)) or any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers: {list(self.layers)} are not ascending layer numbers, each named once; sort them")
        if self.order is not None and sorted(self.order) != list(self.layers):
            raise ValueError(f"order: {list(self.order)} does not name each of the layers {list(self.layers)} once")

    def choose(self, num: int, place: str = "num_layers") -> tuple[int, ...]:
        """The `num` least important layers, ascending.

        Raises:
            ValueError: there are not so many, or fewer than one are asked for.
        """
        total = len(self.layers)
        if not 1 <= num <= total:
            raise ValueError(f"{place}: {num} is out of range; {total} layers are ranked, use 1..{total}")
        if self.order is not None:
            return tuple(sorted(self.order[:num]))
        return tuple(self.layers[(2 * i + 1) * total // (2 * num)] for i in range(num))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "method": self.method,
            "layers": list(self.layers),
            "order": None if self.order is None else list(self.order),
        }


@dataclass(frozen=True)
class Ranking(LayerOrder):
    """A scorer's word on a model's attention layers.

    Attributes:
        num_layers: of the model, layers that are no longer attention included.
        mixer: what the layers would be replaced by.
        scores: importance of each of `layers`, in `unit`; None for a control, which looks at no model.
        before: for `mmr`, the same before any training: the loss with the mixer as initialised; else None.
        settings: what the scores depend on, plain data.
        cost: `tokens` trained on and `seconds` taken, and what `rank_cost` says.
        controls: the uniform and the random order over the same layers, by name.
        unit: of the scores.
        baseline: the same measure of the whole model (`loo`, `window`, `perplexity`, `import`), or of the all-mixer
            student (`kl`); None where there is none.
    """

    num_layers: int
    mixer: MixerSpec
    scores: Mapping[int, float] | None
    before: Mapping[int, float] | None
    settings: Mapping[str, Any]
    cost: Mapping[str, float]
    controls: Mapping[str, LayerOrder] = field(default_factory=dict)
    unit: str = NAT_PER_TOKEN
    baseline: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers or self.layers[-1] >= self.num_layers:
            raise ValueError(f"layers: {list(self.layers)} are not layers of a model of {self.num_layers}")
        for name in ("scores", "before"):
            values = getattr(self, name)
            if values is None:
                continue
            if sorted(values) != list(self.layers):
                raise ValueError(f"{name}: given for layers {sorted(values)}, not for {list(self.layers)}")
            unsound = [layer for layer, value in values.items() if not math.isfinite(value)]
            if unsound:
                raise ValueError(f"{name}: not a finite number for layers {unsound}; rank again")
        if self.baseline is not None and not math.isfinite(self.baseline):
            raise ValueError(f"baseline: {self.baseline} is not a finite number; rank again")
        if self.scores is not None and self.order != order_by_score(self.scores):
            raise ValueError(f"order: {self.order} does not ascend in score; sort it, or rank again")
        for name in ("uniform", "random"):
            if name not in self.controls:
                raise ValueError(f"controls: {name!r} is missing; a ranking is never shown alone")
            if self.controls[name].layers != self.layers:
                raise ValueError(f"controls.{name}.layers: they differ from the layers ranked; rank again")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the format's tag."""
        return {
            "format": FORMAT,
            **super().as_dict(),
            "num_layers": self.num_layers,
            "mixer": self.mixer.model_dump(),
            "unit": self.unit,
            "scores": _by_name(self.scores),
            "before": _by_name(self.before),
            "baseline": self.baseline,
            "settings": dict(self.settings),
            "cost": dict(self.cost),
            "controls": {name: control.as_dict() for name, control in self.controls.items()},
        }

    @classmethod
    def from_dict(cls, value: object, place: str = "ranking") -> Self:
        """Read what `as_dict` wrote.

        Raises:
            ValueError: it is another format, a field is missing or does not fit; names the field and `place`.
        """
        fields = _Fields(value, place)
        tag = fields.value.get("format")
        if tag != FORMAT:
            raise ValueError(
                f"{place}: format: {tag!r} is not {FORMAT!r}; give a ranking.json that this version of "
                "hybridize wrote, or run the rank stage again"
            )
        try:
            controls = fields.take("controls", dict)
            return cls(
                **_read_order(fields),
                num_layers=fields.take("num_layers", int),
                mixer=parse_mixer(fields.take("mixer", dict)),
                unit=fields.take("unit", str),
                scores=fields.take_scores("scores"),
                before=fields.take_scores("before"),
                baseline=fields.take_number("baseline"),
                settings=fields.take("settings", dict),
                cost=fields.take("cost", dict),
                controls={
                    name: LayerOrder(**_read_order(_Fields(control, f"controls.{name}")))
                    for name, control in controls.items()
                },
            )
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def order_by_score(scores: Mapping[int, float]) -> tuple[int, ...]:
    """Layers by ascending score; of equals, the lower layer first."""
    return tuple(sorted(scores, key=lambda layer: (scores[layer], layer)))


def save_ranking(ranking: Ranking, path: str | Path) -> Path:
    """Write a ranking as JSON; the file appears whole or not at all."""
    write_json(Path(path), ranking.as_dict())
    return Path(path)


def load_ranking(path: str | Path) -> Ranking:
    """Read a ranking file.

    Raises:
        ValueError: the file is missing, no JSON or no ranking; names the file, the field and the remedy.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"ranking {path}: cannot be read ({error.strerror}); check the path, or run the rank stage"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"ranking {path}: is not JSON ({error}); run the rank stage again") from None
    return Ranking.from_dict(value, f"ranking {path}")


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all; a number that is not finite is an error."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


class _Fields:
    """A mapping read field by field, with errors that name the field."""

    def __init__(self, value: object, place: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{place}: {type(value).__name__} instead of a mapping; run the rank stage again")
        self.value: dict[str, Any] = value

    def take(self, name: str, kind: type) -> Any:
        if name not in self.value:
            raise ValueError(f"{name}: required, but missing; run the rank stage again")
        found = self.value[name]
        if not isinstance(found, kind) or isinstance(found, bool):
            raise ValueError(f"{name}: {found!r} is no {kind.__name__}; run the rank stage again")
        return found

    def take_layers(self, name: str) -> tuple[int, ...]:
        layers = self.take(name, list)
        if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
            raise ValueError(f"{name}: {layers} are not layer numbers; run the rank stage again")
        return tuple(layers)

    def take_scores(self, name: str) -> dict[int, float] | None:
        if self.value.get(name, ...) is None:
            return None
        try:
            return {int(layer): float(score) for layer, score in self.take(name, dict).items()}
        except TypeError:
            raise ValueError(f"{name}: not a number for every layer; run the rank stage again") from None

    def take_number(self, name: str) -> float | None:
        return None if self.value.get(name) is None else float(self.take(name, float))


def _read_order(fields: _Fields) -> dict[str, Any]:
    order = None if fields.value.get("order", ...) is None else fields.take_layers("order")
    return {"method": fields.take("method", str), "layers": fields.take_layers("layers"), "order": order}


def _by_name(values: Mapping[int, float] | None) -> dict[str, float] | None:
    return None if values is None else {str(layer): value for layer, value in values.items()}

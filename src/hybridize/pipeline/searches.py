"""What the report shows of a search: predictions, their controls, and what was measured of the layout later."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from hybridize.pipeline.artifacts import Artifact
from hybridize.pipeline.stages import METRICS_FILE
from hybridize.pipeline.stages.training import loss_of
from hybridize.report import MeasuredLoss, Search, SearchCurve, SearchPoint


def show_search(name: str, result: Any, measured: Iterable[MeasuredLoss] = ()) -> Search:
    """A search's outcome (`hybridize.importance.SearchResult`) as what a report draws.

    Args:
        name: of its stage.
        result: what it found.
        measured: losses of models that have its layout.
    """
    curves = [SearchCurve("best layout", _points(result.frontier))]
    for key, points in result.controls.items():
        letter, _, placing = key.partition("/")
        kind = result.blocks[letter].type
        label = f"{kind}, evenly spaced" if placing else f"{kind} only"
        curves.append(SearchCurve(label, _points(points), is_control=bool(placing)))
    return Search(
        name=name,
        layout=result.chosen.layout,
        meanings={"a": "attention"} | {letter: mixer.type for letter, mixer in result.blocks.items()},
        chosen=_points([result.chosen])[0],
        curves=tuple(curves),
        verdict=result.verdict,
        is_exact=result.exact,
        method=result.method,
        unit=result.unit,
        cost_unit=result.cost_unit,
        measured=tuple(measured),
    )


def _points(found: Iterable[Any]) -> tuple[SearchPoint, ...]:
    return tuple(
        SearchPoint(f.layout, f.num_replaced, f.loss, f.cost, f.speedup, f.groups)
        for f in sorted(found, key=lambda f: f.speedup)
    )


def measured_losses(models: Iterable[str], artifacts: Mapping[str, Artifact]) -> list[MeasuredLoss]:
    """The divergence from the teacher in the first and in the last step of each distillation of a layout.

    Args:
        models: distillations of it.
        artifacts: finished stages by name.
    """
    found = []
    for model in models:
        lines = (artifacts[model].folder / METRICS_FILE).read_text().splitlines()
        if lines:
            first, last = json.loads(lines[0]), json.loads(lines[-1])
            found.append(MeasuredLoss(model, loss_of(first), loss_of(last), last["tokens"]))
    return found

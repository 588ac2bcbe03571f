"""The page: what is shown, in which words; the template beside this file says how."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from hybridize.files import write_whole
from hybridize.report import plots, summary
from hybridize.report.data import LossCurve, ReportData, break_even_tokens

PAGE_NAME = "report.html"
MAX_TABLE_POINTS = 40


@dataclass(frozen=True)
class Plot:
    """A drawn plot: its file name beside the page, its bytes, and what it says to those who cannot see it."""

    name: str
    png: bytes
    alt: str

    @property
    def source(self) -> str:
        """The picture as a data URL, so that the page needs no second file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def write_report(out_dir: Path, data: ReportData) -> Path:
    """Write `report.html` and, beside it, each plot as a PNG.

    Each file appears whole or not at all; the same data give the same bytes. Plots of an earlier report that
    this one does not have are removed.

    Args:
        out_dir: where to; made if missing.
        data: the run.

    Returns:
        The page's path.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    drawn = draw_plots(data)
    for name in _PLOT_NAMES:
        if name in drawn:
            write_whole(out_dir / f"{name}.png", drawn[name].png)
        else:
            (out_dir / f"{name}.png").unlink(missing_ok=True)
    page = out_dir / PAGE_NAME
    write_whole(page, render_page(data, drawn).encode("utf-8"))
    return page


def render_page(data: ReportData, drawn: Mapping[str, Plot] | None = None) -> str:
    """The page as HTML text: no script, no request to anywhere, every inserted string escaped.

    Args:
        data: the run.
        drawn: its plots from `draw_plots`; drawn here when left out.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=summary.percent,
        interval=summary.interval,
        number=summary.number,
        duration=summary.duration,
        bytes=summary.short_bytes,
    )
    template = environment.from_string(Path(__file__).with_name("template.html.j2").read_text("utf-8"))
    return template.render(_context(data, draw_plots(data) if drawn is None else drawn))


_PLOT_NAMES = ("accuracy", "importance", "layers", "loss", "memory")


def draw_plots(data: ReportData) -> dict[str, Plot]:
    """Draw what the data allow, by file name without suffix; a section without data has no plot."""
    drawn: dict[str, Plot] = {}

    def add(name: str, png: bytes, alt: str) -> None:
        drawn[name] = Plot(name, png, alt)

    if data.evaluations:
        parts = [f"{entry.label} {summary.percent(entry.overall.accuracy)}" for entry in data.evaluations]
        add(
            "accuracy",
            plots.accuracy_chart(data.evaluations),
            f"Bar chart of right answers, overall and by task, with 95% intervals. Overall: {'; '.join(parts)}.",
        )
    scored = [entry for entry in data.rankings if any(score is not None for score in entry.scores)]
    if scored:
        parts = [f"{entry.method} would replace {_listing(entry.chosen)}" for entry in scored]
        add(
            "importance",
            plots.importance_chart(scored),
            f"Bar chart of the importance of each layer by method. {'; '.join(parts)}.",
        )
    if data.rankings:
        parts = [f"{entry.method}: {_listing(entry.chosen)}" for entry in data.rankings]
        add("layers", plots.layer_strips(data.rankings), f"Strips of replaced layers. {'; '.join(parts)}.")
    curves = [curve for curve in data.losses if curve.steps]
    if curves:
        ends = [(curve.label, *map(summary.number, (curve.losses_nats[0], curve.losses_nats[-1]))) for curve in curves]
        parts = [f"{label} from {first} to {last}" for label, first, last in ends]
        add(
            "loss",
            plots.loss_chart(curves),
            f"Line chart of the loss in nat per token against tokens. {'; '.join(parts)}.",
        )
    if data.memory:
        parts = [f"{model.label} {summary.short_bytes(model.bytes_at(131072))}" for model in data.memory]
        add(
            "memory",
            plots.memory_chart(data.memory),
            f"Line chart of a sequence's cache against its length. At 131072 tokens: {'; '.join(parts)}.",
        )
    return drawn


def _context(data: ReportData, drawn: Mapping[str, Plot]) -> dict[str, Any]:
    # Attention takes the pale first colour, wherever it stands.
    kinds = sorted(dict.fromkeys(data.layout), key=lambda kind: kind != "attention")
    first_memory = data.memory[0] if data.memory else None
    return {
        "data": data,
        "plots": drawn,
        "headline": summary.headline(data),
        "layout_kinds": [
            {"name": kind, "index": index, "letter": _letter(kind, kinds), "count": data.layout.count(kind)}
            for index, kind in enumerate(kinds)
        ],
        "layout_cells": [(kinds.index(kind), _letter(kind, kinds)) for kind in data.layout],
        "evaluation_rows": [(entry, summary.kept_of_teacher(data, entry.overall)) for entry in data.evaluations],
        "any_steps_judged": any(entry.steps_correct is not None for entry in data.evaluations),
        "tasks": list(dict.fromkeys(task for entry in data.evaluations for task in entry.tasks)),
        "ranking_has_control": any(entry.is_control for entry in data.rankings),
        "curves": [curve for curve in data.losses if curve.steps],
        "curve_points": [(curve, _points(curve)) for curve in data.losses if curve.steps],
        "memory_rows": [
            (model, None if first_memory is None else break_even_tokens(first_memory, model)) for model in data.memory
        ],
        "seconds": sum(cost.seconds for cost in data.costs),
    }


def _letter(kind: str, kinds: list[str]) -> str:
    """A capital for a mixer type, its first letter that no type before it took: legible without colours."""
    taken: list[str] = []
    for other in kinds:
        letter = next((char for char in other.upper() if char.isalnum() and char not in taken), "?")
        if other == kind:
            return letter
        taken.append(letter)
    return "?"


def _points(curve: LossCurve) -> list[tuple[int, int, float]]:
    """(step, tokens, loss) of every point or, from long curves, of evenly spaced ones with the last."""
    points = list(zip(curve.steps, curve.tokens, curve.losses_nats, strict=True))
    if len(points) <= MAX_TABLE_POINTS:
        return points
    last = len(points) - 1
    return [points[round(index * last / (MAX_TABLE_POINTS - 1))] for index in range(MAX_TABLE_POINTS)]


def _listing(layers: tuple[int, ...]) -> str:
    return "layers " + ", ".join(str(layer) for layer in sorted(layers)) if layers else "no layer"

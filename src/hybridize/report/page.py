"""The page: what is shown, in which words; the templates beside this file say how."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hybridize.files import write_whole
from hybridize.report import numbers, summary
from hybridize.report.data import Model, ReportData, break_even_tokens
from hybridize.report.figures import PLOT_NAMES, Plot, draw_plots, search_plots
from hybridize.report.measures import LossCurve
from hybridize.report.study import (
    Measure,
    frontier,
    grouped,
    main_setting,
    main_suite,
    ranking_groups,
    settings,
    suites,
)

PAGE_NAME = "report.html"
MAX_TABLE_POINTS = 40


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
    for old in out_dir.glob("*.png"):
        if re.sub(r"-\d+$", "", old.stem) in PLOT_NAMES and old.stem not in drawn:
            old.unlink()
    for name, plot in drawn.items():
        write_whole(out_dir / f"{name}.png", plot.png)
    page = out_dir / PAGE_NAME
    write_whole(page, render_page(data, drawn).encode("utf-8"))
    return page


def render_page(data: ReportData, drawn: Mapping[str, Plot] | None = None) -> str:
    """The page as HTML text: no script, no request to anywhere, every inserted string escaped.

    Args:
        data: the run.
        drawn: its plots from `draw_plots`; drawn here when left out.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=numbers.percent,
        interval=numbers.interval,
        times=numbers.times,
        number=numbers.number,
        duration=numbers.duration,
        bytes=numbers.short_bytes,
        token_count=numbers.token_count,
    )
    template = environment.get_template("page.html.j2")
    return template.render(_context(data, draw_plots(data) if drawn is None else drawn))


@dataclass(frozen=True)
class StudyRow:
    """One model with all that is known of it, for the table beside the frontier."""

    model: Model
    quality: Measure | None
    of_teacher: float | None
    speed: Measure | None
    tokens_per_second: float | None


def _context(data: ReportData, drawn: Mapping[str, Plot]) -> dict[str, Any]:
    # Attention takes the pale first colour, wherever it stands.
    kinds = sorted(dict.fromkeys(data.layout), key=lambda kind: kind != "attention")
    first_memory = data.memory[0] if data.memory else None
    place = frontier(data)
    curves = [curve for curve in data.losses if curve.steps]
    return {
        "data": data,
        "plots": drawn,
        "headline": summary.headline(data),
        "key_figures": summary.key_figures(data),
        "layout_kinds": [
            {"name": kind, "index": index, "letter": _letter(kind, kinds), "count": data.layout.count(kind)}
            for index, kind in enumerate(kinds)
        ],
        "layout_cells": [(kinds.index(kind), _letter(kind, kinds)) for kind in data.layout],
        "has_mixers": any(kind != "attention" for kind in data.layout),
        "study": _study(data),
        "frontier_note": place.note if place else "",
        "main_setting": main_setting(data),
        "suites": [_suite_context(data, index, suite) for index, suite in enumerate(suites(data))],
        "settings": settings(data),
        "ranking_groups": ranking_groups(data.rankings),
        "ranking_has_control": any(entry.is_control for entry in data.rankings),
        "importance_plots": _numbered(drawn, "importance"),
        "before_after_plots": _numbered(drawn, "before_after"),
        "search_plots": search_plots(data),
        "sloped": [entry for entry in data.rankings if entry.slopes],
        "curve_groups": list(grouped(curves, lambda curve: (curve.kind, curve.unit)).items()),
        "curve_points": [(curve, _points(curve)) for curve in curves],
        "memory_rows": [
            (model, None if first_memory is None else break_even_tokens(first_memory, model)) for model in data.memory
        ],
        "seconds": sum(cost.seconds for cost in data.costs),
    }


def _numbered(drawn: Mapping[str, Plot], name: str) -> list[Plot]:
    """`name`, `name-2` and so on, as many as were drawn."""
    return [plot for key, plot in drawn.items() if re.sub(r"-\d+$", "", key) == name]


def _study(data: ReportData) -> list[StudyRow]:
    """Every model that is listed or judged, the teacher first and controls last."""
    suite, setting = main_suite(data), main_setting(data)
    rows = {row.model.name: row for row in suite.rows} if suite else {}
    names = dict.fromkeys([*(model.name for model in data.models), *rows])
    found = []
    for name in names:
        listed = any(model.name == name for model in data.models)
        model = data.model(name) if listed or name not in rows else rows[name].model
        quality = rows[name].overall if name in rows else None
        teacher = suite.teacher if suite else None
        kept = quality.value / teacher.value if quality and teacher and teacher.value else None
        speed = setting.of(name) if setting else None
        rate = setting.speeds[name].tokens_per_second if setting and name in setting.speeds else None
        found.append(StudyRow(model, quality, kept, speed, rate))
    return sorted(found, key=lambda row: (not row.model.is_teacher, row.model.is_control))


def _suite_context(data: ReportData, index: int, suite: Any) -> dict[str, Any]:
    """A suite with its plots; of the harness also metrics, of the others also counts."""
    suffix = f"-{index + 1}" if index else ""
    entries = [] if suite.is_harness else [entry for entry in data.evaluations if entry.suite == suite.name]
    entries.sort(key=lambda entry: data.model(entry.key).is_control or entry.is_control)
    return {
        "suite": suite,
        "accuracy": f"accuracy{suffix}",
        "tasks_plot": f"tasks{suffix}",
        "rows": [(entry, summary.kept_of_teacher(data, entry.overall, suite.name)) for entry in entries],
        "tasks": list(dict.fromkeys(task for entry in entries for task in entry.tasks)),
        "any_steps_judged": any(entry.steps_correct is not None for entry in entries),
        "passes": sorted({k for entry in entries for k in entry.pass_at}),
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
    points = list(zip(curve.steps, curve.tokens, curve.losses, strict=True))
    if len(points) <= MAX_TABLE_POINTS:
        return points
    last = len(points) - 1
    return [points[round(index * last / (MAX_TABLE_POINTS - 1))] for index in range(MAX_TABLE_POINTS)]

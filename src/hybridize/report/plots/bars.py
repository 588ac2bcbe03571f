"""Quality and speed of models side by side: a row per model, a panel per measurement."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hybridize.report.data import Model
from hybridize.report.numbers import number, percent, times
from hybridize.report.plots.style import BLUE, INK, MUTED, SKY, grid, new_figure, png, wrapped
from hybridize.report.study import MANY_ROWS, Measure, Setting, Suite

_CONTROL_HATCH = "/////"


@dataclass(frozen=True)
class _Panel:
    """One measurement of all models.

    Attributes:
        label: of the x axis, or of the panel.
        measures: one per model; None where it was not measured.
        unit: how values are written: as shares in 0..1, as multiples, or as counts.
        missing: what stands where there is no measure.
    """

    label: str
    measures: Sequence[Measure | None]
    unit: str
    missing: str = "not measured"

    @classmethod
    def of_setting(cls, setting: Setting, models: Sequence[Model], label: str) -> "_Panel":
        unit = "multiple" if setting.is_relative else "count"
        return cls(label, [setting.of(model.name) for model in models], unit)

    @property
    def top(self) -> float:
        """Where the ticks end."""
        known = [measure for measure in self.measures if measure is not None]
        return 1.0 if self.unit == "share" else max([m.high or m.value for m in known], default=1.0)

    def write(self, value: float) -> str:
        """A value as text."""
        if self.unit == "share":
            return percent(value)
        return times(value) if self.unit == "multiple" else number(round(value))


@png
def score_chart(suite: Suite, setting: Setting | None, result: str, *, narrow: bool) -> Figure:
    """Accuracy over all tasks with its 95% interval and, in a panel of its own, throughput with its range.

    Args:
        suite: the models.
        setting: how throughput was measured; None: it was not.
        result: name of the model to emphasise.
        narrow: for a narrow screen.

    Returns:
        A PNG.
    """
    models = [row.model for row in suite.rows]
    name = "mean over tasks" if suite.is_harness else "right answers"
    missing = "not judged on all tasks" if suite.is_harness else "not judged"
    panels = [_Panel(name, [row.overall for row in suite.rows], "share", missing)]
    if setting is not None and any(setting.of(model.name) for model in models):
        panels.append(_Panel.of_setting(setting, models, setting.unit))
    return _draw(models, panels, 1 if narrow else len(panels), result, narrow)


@png
def task_chart(suite: Suite, result: str, *, narrow: bool) -> Figure:
    """Accuracy with its 95% interval, one panel per task."""
    panels = [_Panel(task, [row.tasks.get(task) for row in suite.rows], "share") for task in suite.tasks]
    columns = 2 if narrow else 3 if len(panels) in (3, 5, 6, 9) else 4
    return _draw([row.model for row in suite.rows], panels, columns, result, narrow, titled=True)


@png
def throughput_chart(models: Sequence[Model], settings: Sequence[Setting], result: str, *, narrow: bool) -> Figure:
    """Throughput with the range of its repeats, one panel per setting."""
    panels = [_Panel.of_setting(setting, models, f"{setting.unit}; {setting}") for setting in settings]
    return _draw(models, panels, 1 if narrow else 2, result, narrow)


def _draw(
    models: Sequence[Model],
    panels: Sequence[_Panel],
    columns: int,
    result: str,
    narrow: bool,
    titled: bool = False,
) -> Figure:
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    places = _row_places(models)
    figure = new_figure(rows * (0.3 * (places[-1] + 1) + (0.75 if titled else 0.9)), narrow)
    small = columns > 2 or (narrow and columns > 1)
    for index, (axes, panel) in enumerate(zip(grid(figure, len(panels), columns), panels, strict=True)):
        # The numbers stand to the right of the bars, so the axis goes on where its ticks end.
        axes.set_xlim(0, panel.top * (1.6 if small else 1.3))
        for place, model, measure in zip(places, models, panel.measures, strict=True):
            _bar(axes, place, model, panel, measure, result, small)
        if panel.unit == "share":
            axes.set_xticks([0, 0.5, 1] if small else [0, 0.25, 0.5, 0.75, 1])
            axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        else:
            ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(0, panel.top)
            axes.set_xticks([tick for tick in ticks if tick <= 1.001 * panel.top])
        if titled:
            axes.set_title(wrapped(panel.label, narrow), fontsize=8.5 if narrow else 9)
        else:
            axes.set_xlabel("\n".join(textwrap.wrap(panel.label, 34 if narrow else 44)), loc="left")
        axes.set_yticks(places, [])
        if index % columns == 0:
            _name_rows(axes, places, models, result, narrow)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(places[-1] + 0.6, -0.6)
        axes.spines["bottom"].set_bounds(0, panel.top)
        axes.grid(True, axis="x")
    return figure


def _row_places(models: Sequence[Model]) -> list[float]:
    """Where each row stands; of many, the teacher, each series, the others and the controls a little apart."""
    places = [0.0]
    for before, model in pairwise(models):
        apart = _kind(before) != _kind(model) and len(models) > MANY_ROWS
        places.append(places[-1] + (1.5 if apart else 1.0))
    return places


def _kind(model: Model) -> tuple[bool, bool, str]:
    return model.is_teacher, model.is_control, "" if model.is_control else model.series


def _name_rows(axes: Axes, places: Sequence[float], models: Sequence[Model], result: str, narrow: bool) -> None:
    names = [wrapped(f"{model.label} (control)" if model.is_control else model.label, narrow) for model in models]
    axes.set_yticks(places, names, fontsize=8 if narrow else 8.5)
    for label, model in zip(axes.get_yticklabels(), models, strict=True):
        label.set_fontweight("bold" if model.name == result else "normal")
        label.set_color(MUTED if model.is_control else INK)


def _bar(
    axes: Axes, place: float, model: Model, panel: _Panel, measure: Measure | None, result: str, small: bool
) -> None:
    size = 7.5 if small else 8.0
    if measure is None:
        text = "–" if small else panel.missing  # noqa: RUF001
        axes.annotate(text, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=size, color=MUTED)
        return
    axes.barh(place, measure.value, height=0.62, linewidth=0.8, **_looks(model, result))
    end = measure.value
    if measure.low is not None and measure.high is not None:
        end = measure.high
        # A white line below the dark one keeps the whisker visible on a dark bar.
        for colour, width, cap in (("white", 2.8, 0.0), (INK, 1.1, 3.2)):
            axes.errorbar(
                [measure.value],
                [place],
                xerr=[[max(0.0, measure.value - measure.low)], [max(0.0, measure.high - measure.value)]],
                fmt="none",
                ecolor=colour,
                elinewidth=width,
                capsize=cap,
            )
    if measure.seeds:
        end = max(measure.seeds)
        axes.plot(
            measure.seeds,
            [place] * len(measure.seeds),
            linestyle="none",
            marker="o",
            markersize=4.0,
            markerfacecolor="white",
            markeredgecolor=INK,
            markeredgewidth=0.9,
            clip_on=False,
        )
    axes.annotate(
        panel.write(measure.value),
        (end, place),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize=size,
        fontweight="bold" if model.name == result else "normal",
        color=INK,
    )


def _looks(model: Model, result: str) -> dict[str, Any]:
    if model.is_control:
        return {"color": "white", "edgecolor": MUTED, "hatch": _CONTROL_HATCH}
    if model.is_teacher:
        return {"color": INK, "edgecolor": INK}
    return {"color": BLUE if model.name == result else SKY, "edgecolor": BLUE}

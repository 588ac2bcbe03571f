"""Lines: the loss while training, and the cache of a growing sequence."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from hybridize.report.data import break_even_tokens
from hybridize.report.measures import CacheMemory, LossCurve
from hybridize.report.numbers import short_bytes, short_count
from hybridize.report.plots.style import INK, MODEL_COLOURS, cut, grid, new_figure, png, scale_for, styled
from hybridize.report.study import grouped, seedless

MAX_CURVES = 8
"""In one panel."""

_LOG_FROM = 20
_PANEL_INCHES, _LEGEND_INCHES = 2.2, 0.158
_LAST_CONTEXT = 131072


@png
def loss_chart(curves: Sequence[LossCurve], *, narrow: bool) -> Figure:
    """Loss against tokens, one panel per kind and unit; controls grey; logarithmic where the range is wide.

    Where one has more than `MAX_CURVES`, the panels are those of `loss_panels`, those of one kind on one y axis.
    """
    groups = list(grouped(curves, lambda curve: (curve.kind, curve.unit)).values())
    if any(len(group) > MAX_CURVES for group in groups):
        return _loss_panels(curves, narrow)
    columns = 1 if narrow or len(groups) == 1 else 2
    legend_rows = [len(group) if narrow or columns > 1 else -(-len(group) // 3) for group in groups]
    rows = -(-len(groups) // columns)
    height = sum(
        (2.3 if narrow or columns > 1 else 3.0) + 0.2 * max(legend_rows[row * columns : (row + 1) * columns])
        for row in range(rows)
    )
    figure = new_figure(height, narrow)
    for axes, group in zip(grid(figure, len(groups), columns), groups, strict=True):
        for curve, looks in styled(group):
            axes.plot(
                curve.tokens,
                curve.losses,
                markevery=max(1, len(curve.tokens) // 12),
                label=cut(f"{curve.label} (control)" if curve.is_control else curve.label, 44),
                **looks,
            )
        scale_for(axes, [loss for curve in group for loss in curve.losses], _LOG_FROM)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.locator_params(axis="x", nbins=5 if narrow or columns > 1 else 8)
        axes.set(xlabel="tokens", ylabel=cut(group[0].unit, 30))
        axes.grid(True, axis="y")
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            borderaxespad=0.3,
            ncols=1 if narrow or columns > 1 else min(3, len(group)),
            title=cut(group[0].kind, 40) if len(groups) > 1 else None,
            title_fontproperties={"weight": "bold", "size": 9},
            alignment="left",
        )
    return figure


@dataclass(frozen=True)
class LossPanel:
    """Curves that are drawn together: their kind and, where it has several panels, what these have in common."""

    kind: str
    name: str
    curves: tuple[LossCurve, ...]


def loss_panels(curves: Sequence[LossCurve]) -> list[LossPanel]:
    """Panels of at most `MAX_CURVES`: of each kind all, or else each series, the others, and the controls.

    Seeds of one model follow one another.
    """
    panels = []
    for (kind, _), alike in grouped(curves, lambda curve: (curve.kind, curve.unit)).items():
        if len(alike) <= MAX_CURVES:
            panels.append(LossPanel(kind, "", tuple(alike)))
            continue
        for name, group in sorted(grouped(alike, _group).items(), key=lambda item: _LAST.index(item[0][0])):
            parts = _parts(group)
            for index, part in enumerate(parts):
                number = f", {index + 1} of {len(parts)}" if len(parts) > 1 else ""
                panels.append(LossPanel(kind, f"{name[1]}{number}", part))
    return panels


_LAST = ("series", "others", "controls")


def _group(curve: LossCurve) -> tuple[str, str]:
    """The kind of a curve's panel, and its name."""
    if curve.is_control:
        return "controls", "controls"
    return ("series", curve.series) if curve.series else ("others", "others")


def _parts(curves: Sequence[LossCurve]) -> list[tuple[LossCurve, ...]]:
    """Curves in parts of at most `MAX_CURVES`, about equal ones; seeds of one model are parted only if they must be."""
    even = math.ceil(len(curves) / math.ceil(len(curves) / MAX_CURVES))
    parts: list[list[LossCurve]] = [[]]
    for seeds in grouped(curves, lambda curve: seedless(curve.label)).values():
        for start in range(0, len(seeds), MAX_CURVES):
            some = seeds[start : start + MAX_CURVES]
            if len(parts[-1]) >= even or len(parts[-1]) + len(some) > MAX_CURVES:
                parts.append([])
            parts[-1] += some
    return [tuple(part) for part in parts if part]


def _loss_panels(curves: Sequence[LossCurve], narrow: bool) -> Figure:
    """Small panels of many curves, each with its legend above."""
    panels = loss_panels(curves)
    columns = 1 if narrow else 3
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    # Placed by hand: a legend wider than its panel would push the others aside.
    heights = [_PANEL_INCHES + _LEGEND_INCHES * (2.2 + max(len(panel.curves) for panel in row)) for row in rows]
    figure = new_figure(sum(heights), narrow)
    figure.set_layout_engine("none")
    room, height = figure.get_size_inches()
    width = (room - 0.15 - 0.8 * columns) / columns
    axes_of = [
        figure.add_axes(
            (
                (0.8 + at * (width + 0.8)) / room,
                1 - (sum(heights[: place + 1]) - 0.5) / height,
                width / room,
                (_PANEL_INCHES - 0.55) / height,
            )
        )
        for place, row in enumerate(rows)
        for at in range(len(row))
    ]
    for index, (axes, panel) in enumerate(zip(axes_of, panels, strict=True)):
        first = panel.curves[0]
        # A panel of controls alone says so in its title; colours tell them apart better than greys.
        alike = all(curve.is_control for curve in panel.curves)
        for curve, looks in styled([replace(c, is_control=False) for c in panel.curves] if alike else panel.curves):
            label = curve.label.removeprefix(f"{curve.series}, ") if curve.series else curve.label
            label = f"{label} (control)" if curve.is_control else label
            looks |= {"markersize": 3.5, "linewidth": 1.3}
            axes.plot(
                curve.tokens, curve.losses, markevery=max(1, len(curve.tokens) // 8), label=cut(label, 28), **looks
            )
        group = [curve for curve in curves if (curve.kind, curve.unit) == (first.kind, first.unit)]
        losses = [loss for curve in group for loss in curve.losses]
        if scale_for(axes, losses, _LOG_FROM):
            axes.set_ylim(min(losses) / 1.3, max(losses) * 1.3)
        else:
            axes.set_ylim(top=1.05 * max(losses) if max(losses) > 0 else None)
        axes.set_xlim(0, 1.05 * max(curve.tokens[-1] for curve in group))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel("tokens")
        if index % columns == 0 or first.unit != panels[index - 1].curves[0].unit:
            axes.set_ylabel("\n".join(textwrap.wrap(first.unit, 20)[:2]), fontsize=8.5)
        axes.grid(True, axis="y")
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            borderaxespad=0.3,
            labelspacing=0.25,
            fontsize=7.5,
            title="\n".join(cut(line, 28) for line in (panel.kind, panel.name) if line),
            title_fontproperties={"weight": "bold", "size": 8.5},
            alignment="left",
        )
    return figure


@png
def memory_chart(models: Sequence[CacheMemory], *, narrow: bool) -> Figure:
    """Cache of one sequence against its length, both logarithmic; crossings with the first model marked.

    Of more than `MAX_CURVES` models, a series is a band between its first model and its last.

    Args:
        models: the first is the baseline.
        narrow: for a narrow screen.

    Returns:
        A PNG; the axis begins at 1k tokens, or earlier where a crossing lies before.
    """
    shown = memory_shown(models)
    crossings = [(model, break_even_tokens(models[0], model)) for model in shown[1:]]
    marked = [(model, tokens) for model, tokens in crossings if tokens is not None and tokens <= _LAST_CONTEXT]
    first = min([1024.0, *(tokens / 2 for _, tokens in marked)])
    contexts = [1]
    while 2 * contexts[0] <= first:
        contexts[0] *= 2
    while contexts[-1] < _LAST_CONTEXT:
        contexts.append(2 * contexts[-1])
    columns = 1 if narrow else 3
    figure = new_figure(2.7 + 0.2 * -(-(len(shown) + bool(marked)) // columns), narrow)
    axes = figure.subplots()
    bands = _bands(models) if len(shown) < len(models) else {}
    for model, looks in styled(shown):
        if model.series in bands:
            looks |= {"color": MODEL_COLOURS[1 + list(bands).index(model.series) % (len(MODEL_COLOURS) - 1)]}
        sizes = [model.bytes_at(context) for context in contexts]
        axes.plot(contexts, sizes, label=cut(model.label, 44), **looks)
    for index, band in enumerate(bands.values()):
        sizes_of = [[model.bytes_at(context) for model in band] for context in contexts]
        colour = MODEL_COLOURS[1 + index % (len(MODEL_COLOURS) - 1)]
        lows, highs = [min(sizes) for sizes in sizes_of], [max(sizes) for sizes in sizes_of]
        axes.fill_between(contexts, lows, highs, color=colour, alpha=0.15, linewidth=0)
    if marked:
        axes.plot(
            [tokens for _, tokens in marked],
            [model.bytes_at(tokens) for model, tokens in marked],
            linestyle="none",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=INK,
            label=cut(f"smaller than {models[0].label} from here on", 44),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(contexts[:: 1 + len(contexts) // (5 if narrow else 10)], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_binary(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_bytes(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="context, tokens", ylabel="cache of one sequence")
    axes.grid(True, axis="y")
    figure.legend(loc="outside upper left", ncols=columns)
    return figure


def memory_shown(models: Sequence[CacheMemory]) -> list[CacheMemory]:
    """Models with a line of their own: all or, of more than `MAX_CURVES`, of each series the first and the last."""
    if len(models) <= MAX_CURVES:
        return list(models)
    bands = _bands(models)
    return [
        model
        for model in models
        if model.series not in bands or model in bands[model.series][:: len(bands[model.series]) - 1]
    ]


def _bands(models: Sequence[CacheMemory]) -> dict[str, list[CacheMemory]]:
    """Series of three models or more; the first of all models is the baseline, and in none."""
    series = grouped([model for model in models[1:] if model.series], lambda model: model.series)
    return {name: members for name, members in series.items() if len(members) > 2}


def _short_binary(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"

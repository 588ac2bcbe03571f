"""The frontier: how much quality is left at which speed."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from hybridize.report.data import Model
from hybridize.report.numbers import short_bytes, token_count
from hybridize.report.plots.labels import along, place_labels
from hybridize.report.plots.style import (
    BLUE,
    GREEN,
    INK,
    LINE_STYLES,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    cut,
    lay_out,
    new_figure,
    png,
    wrapped,
)
from hybridize.report.study import Frontier, FrontierPoint, grouped

MANY = 12
"""Points; with more, series are lines and only what matters most has a label."""

MAX_LABELS = 12
_SERIES_LOOKS = ((VERMILION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (MUTED, "P"))
_SMALL_POINTS, _ASIDE_POINTS = 4.5, 15.0


@png
def frontier_chart(frontier: Frontier, result: str, num_layers: int, *, narrow: bool) -> Figure:
    """A point per model with its 95% interval: the teacher a star, hybrids discs, controls crosses.

    Each is labelled with its mixer layers and the tokens spent on it so far. A thin line joins the points that no other
    beats in both; a dotted one marks the teacher's quality. Of more than `MANY` points, each series is a line of its
    own, the others are small, and only those of `labelled` have a label and their interval.

    Args:
        frontier: at least two points.
        result: name of the model to emphasise.
        num_layers: of the teacher; 0 if unknown.
        narrow: for a narrow screen.

    Returns:
        A PNG.
    """
    many = is_crowded(frontier)
    series = _series(frontier) if many else {}
    named = labelled(frontier, result, narrow)
    figure = new_figure((4.8 if many else 4.3) if narrow else (5.2 if many else 4.6), narrow)
    axes = figure.subplots()
    _set_axes(axes, frontier, named, narrow)
    _legend(figure, frontier, result, series, narrow)
    lay_out(figure)
    xs = _places(axes, frontier, result, series)
    for point, x in zip(frontier.points, xs, strict=True):
        value, low, high = point.quality.value, point.quality.low, point.quality.high
        if low is not None and high is not None and point in named:
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar([x], [value], yerr=error, fmt="none", ecolor=MUTED, elinewidth=1, capsize=3)
        if not many or _stands_out(point.model, result):
            axes.plot([x], [value], linestyle="none", zorder=3, **_looks(point.model, result))
        elif point.model.series not in series:
            axes.plot([x], [value], linestyle="none", zorder=2, **_small_looks(point.model, result))
    for name, looks in series.items():
        line = [(x, p.quality.value) for p, x in zip(frontier.points, xs, strict=True) if p.model.series == name]
        axes.plot(*zip(*line, strict=True), zorder=2.5, **looks)
    best = [(x, p.quality.value) for p, x in zip(frontier.points, xs, strict=True) if p in frontier.best]
    axes.plot(*zip(*sorted(best), strict=True), color=BLUE, linewidth=0.9, alpha=0.7, zorder=1)
    teacher = next((point for point in frontier.points if point.model.is_teacher), None)
    if teacher is not None:
        axes.axhline(teacher.quality.value, color=INK, linewidth=1.2, linestyle=":", zorder=2)
    _write_labels(axes, frontier, xs, named, result, num_layers, narrow)
    return figure


def is_crowded(frontier: Frontier) -> bool:
    """Whether there are too many points for a label at each."""
    return len(frontier.points) > MANY


def labelled(frontier: Frontier, result: str, narrow: bool) -> tuple[FrontierPoint, ...]:
    """Points with a label, the most important first; where they crowd, at most `MAX_LABELS`, on narrow screens 8.

    Those are the emphasised model, the teacher, both ends of each series, and the points that no other beats.
    """
    first = sorted(frontier.points, key=lambda point: (point.model.name != result, not point.model.is_teacher))
    if not is_crowded(frontier):
        return tuple(first)
    kept = [point for point in first if _stands_out(point.model, result)]
    for points in grouped([p for p in frontier.points if p.model.series], lambda p: p.model.series).values():
        kept += [points[-1], points[0]]
    return tuple(dict.fromkeys([*kept, *reversed(frontier.best)]))[: 8 if narrow else MAX_LABELS]


def _stands_out(model: Model, result: str) -> bool:
    return model.is_teacher or model.name == result


def _series(frontier: Frontier) -> dict[str, dict[str, Any]]:
    """The looks of each series' line, by name."""
    names = dict.fromkeys(point.model.series for point in frontier.points if point.model.series)
    looks = {}
    for index, name in enumerate(names):
        colour, marker = _SERIES_LOOKS[index % len(_SERIES_LOOKS)]
        style = LINE_STYLES[index // len(_SERIES_LOOKS) % len(LINE_STYLES)]
        looks[name] = {"color": colour, "marker": marker, "linestyle": style, "linewidth": 1.6, "markersize": 5.5}
    return looks


def _set_axes(axes: Axes, frontier: Frontier, named: Sequence[FrontierPoint], narrow: bool) -> None:
    xs = [point.x for point in frontier.points]
    room = 0.18 * (max(xs) - min(xs)) or 0.5
    low, high = min(xs) - room, max(xs) + room * (2 if narrow else 1)
    if is_crowded(frontier):
        low, high = min(xs) - 0.5 * room, max(xs) + room
        low = max(low, -0.9) if frontier.axis == "mixers" else low
    axes.set_xlim(max(low, 0) if frontier.axis == "cache" else low, high)
    ends = [end for p in named for end in (p.quality.low, p.quality.high) if end is not None]
    ends += [point.quality.value for point in frontier.points]
    margin = 0.08 * (max(ends) - min(ends)) or 0.05
    # A little beyond what accuracy can be, so that neither a mark nor the dotted line lies on the frame.
    axes.set_ylim(max(-margin / 2, min(ends) - margin), min(1 + margin / 2, max(ends) + margin))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    if frontier.axis == "cache":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_bytes(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 8, integer=frontier.axis == "mixers"))
    if is_crowded(frontier) and frontier.axis == "mixers" and not narrow:
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    axes.set(xlabel=textwrap.fill(frontier.label, 44 if narrow else 80), ylabel="accuracy")
    axes.grid(True, axis="both")


def _places(axes: Axes, frontier: Frontier, result: str, series: Mapping[str, Any]) -> list[float]:
    """Where each point is drawn: a crowd's small ones stand aside, but little, from what they would cover."""
    xs = [point.x for point in frontier.points]
    if not is_crowded(frontier):
        return xs
    to_pixels = axes.figure.dpi / 72
    pixels = axes.transData.transform([(point.x, point.quality.value) for point in frontier.points])
    room = _ASIDE_POINTS * to_pixels
    if frontier.axis == "mixers":
        (left, _), (right, _) = axes.transData.transform([(0, 0), (1, 0)])
        room = min(room, 0.45 * (right - left))
        for index, name in enumerate(series):
            for at, point in enumerate(frontier.points):
                if point.model.series == name:
                    pixels[at][0] += 4 * to_pixels * (index - (len(series) - 1) / 2)
    small = [
        at
        for at, point in enumerate(frontier.points)
        if not _stands_out(point.model, result) and point.model.series not in series
    ]
    size = _SMALL_POINTS * to_pixels
    taken = [(x, y) for at, (x, y) in enumerate(pixels.tolist()) if at not in small]
    steps = sorted((size * step / 4 for step in range(-80, 81)), key=abs)
    for at in small:
        x, y = pixels[at].tolist()

        def covered(step: float, x: float = x, y: float = y) -> float:
            return sum(max(0.0, 1 - math.hypot(x + step - left, y - bottom) / size) ** 2 for left, bottom in taken)

        pixels[at][0] = x + min((step for step in steps if abs(step) <= room), key=covered)
        taken.append(tuple(pixels[at].tolist()))
    return axes.transData.inverted().transform(pixels)[:, 0].tolist()


def _write_labels(
    axes: Axes,
    frontier: Frontier,
    xs: Sequence[float],
    named: Sequence[FrontierPoint],
    result: str,
    num_layers: int,
    narrow: bool,
) -> None:
    """Each label beside its point; the emphasised model and the teacher choose their place first."""
    to_pixels = axes.figure.dpi / 72
    many = is_crowded(frontier)
    at = dict(zip(frontier.points, xs, strict=True))
    best = sorted((at[point], point.quality.value) for point in frontier.best)
    lines = along(axes.transData.transform(best).tolist())
    obstacles = []
    for point in frontier.points:
        value, low, high = point.quality.value, point.quality.low, point.quality.high
        if point not in named:
            low = high = value
        ends = (value if low is None else low, value if high is None else high)
        (x, y), (_, bottom), (_, top) = axes.transData.transform([(at[point], end) for end in (value, *ends)])
        size = (5 if point in named else _SMALL_POINTS / 2) * to_pixels
        obstacles.append((x - 2 * to_pixels, bottom, x + 2 * to_pixels, top))
        obstacles.append((x - size, y - size, x + size, y + size))
        if point.model.is_teacher:
            ends_of_line = axes.transData.transform([(end, value) for end in axes.get_xlim()])
            lines += along(ends_of_line.tolist())
    colours = {name: _darker(looks["color"]) for name, looks in _series(frontier).items()} if many else {}
    points, texts = list(named), [_label(point.model, num_layers, narrow, many) for point in named]
    if many:
        series = grouped([point for point in frontier.points if point.model.series], lambda p: p.model.series)
        for entries in series.values():
            path = [(at[point], point.quality.value) for point in entries]
            lines += along(axes.transData.transform(path).tolist())
            for point in entries:
                if point not in named and point.model.num_mixers and frontier.axis != "mixers":
                    points.append(point)
                    texts.append(str(point.model.num_mixers))
    place_labels(
        axes,
        [(at[point], point.quality.value) for point in points],
        texts,
        obstacles,
        lines,
        ["bold" if point.model.name == result else "normal" for point in points],
        size=7.5 if narrow or many else 8,
        drop=many,
        colours=[colours.get(point.model.series, INK) for point in points],
    )


def _darker(colour: str) -> tuple[float, ...]:
    """A colour for letters, which are thinner than lines."""
    return tuple(0.7 * part for part in to_rgb(colour))


def _looks(model: Model, result: str) -> dict:
    if model.is_teacher:
        return {"marker": "*", "markersize": 14, "color": INK}
    if model.is_control:
        return {"marker": "X", "markersize": 8, "markerfacecolor": "white", "markeredgecolor": MUTED}
    if model.name == result:
        return {"marker": "o", "markersize": 10, "color": BLUE, "markeredgecolor": INK}
    return {"marker": "o", "markersize": 8, "color": SKY, "markeredgecolor": BLUE}


def _small_looks(model: Model, result: str) -> dict:
    size = _SMALL_POINTS + (0.5 if model.is_control else 0)
    return _looks(model, result) | {"markersize": size, "markeredgewidth": 0.8}


def _label(model: Model, num_layers: int, narrow: bool, many: bool) -> str:
    """`H-12, 12 of 24 / 4.9M tokens`; what is unknown, or said already, is left out; in a crowd, all but the name."""
    if many:
        known = not model.series or model.series in model.label
        return wrapped(model.label if known else f"{model.series}, {model.label}", narrow)
    lines = [wrapped(model.label, narrow)]
    if model.num_mixers:
        mixers = f"{model.num_mixers} of {num_layers}" if num_layers else f"{model.num_mixers} mixers"
        if mixers not in model.label:
            lines.append(f"{mixers} mixers" if num_layers else mixers)
    if model.cumulative_tokens:
        lines.append(token_count(model.cumulative_tokens))
    return "\n".join(lines)


def _legend(figure: Figure, frontier: Frontier, result: str, series: Mapping[str, Any], narrow: bool) -> None:
    kinds = {"teacher": Model("teacher", ""), "result": Model(result, ""), "hybrid": Model("", "")}
    kinds["control"] = Model(" ", "", is_control=True)
    models = [point.model for point in frontier.points]
    plain = [model for model in models if not (model.is_control or model.is_teacher)]
    plain = [model for model in plain if model.name == result or model.series not in series]
    present = {
        "teacher": any(model.is_teacher for model in models),
        "result": any(model.name == result for model in plain),
        "hybrid": any(model.name != result for model in plain),
        "control": any(model.is_control for model in models),
    }
    names = {"teacher": "teacher", "result": "the hybrid", "hybrid": "other hybrids", "control": "controls"}
    shown = [kind for kind in kinds if present[kind]]
    handles = {}
    for kind in shown:
        small = is_crowded(frontier) and kind in ("hybrid", "control")
        looks = _small_looks(kinds[kind], result) if small else _looks(kinds[kind], result)
        handles[names[kind]] = Line2D([], [], linestyle="none", **looks)
        if kind == "result" or (kind == "teacher" and "result" not in shown):
            handles |= {cut(name, 32): Line2D([], [], **line) for name, line in series.items()}
    columns = 2 if narrow else 3 if len(handles) > 4 else 4
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=columns)

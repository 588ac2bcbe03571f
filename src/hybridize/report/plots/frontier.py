"""The frontier: how much quality is left at which speed."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from hybridize.report.data import Model
from hybridize.report.numbers import short_bytes, token_count
from hybridize.report.plots.labels import along, place_labels
from hybridize.report.plots.style import BLUE, INK, MUTED, SKY, lay_out, new_figure, png, wrapped
from hybridize.report.study import Frontier


@png
def frontier_chart(frontier: Frontier, result: str, num_layers: int, *, narrow: bool) -> Figure:
    """A point per model with its 95% interval: the teacher a star, hybrids discs, controls crosses.

    Each is labelled with its mixer layers and the tokens spent on it so far. A thin line joins the points that no other
    beats in both; a dotted one marks the teacher's quality.

    Args:
        frontier: at least two points.
        result: name of the model to emphasise.
        num_layers: of the teacher; 0 if unknown.
        narrow: for a narrow screen.

    Returns:
        A PNG.
    """
    figure = new_figure(4.3 if narrow else 4.6, narrow)
    axes = figure.subplots()
    for point in frontier.points:
        value, low, high = point.quality.value, point.quality.low, point.quality.high
        if low is not None and high is not None:
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar([point.x], [value], yerr=error, fmt="none", ecolor=MUTED, elinewidth=1, capsize=3)
        axes.plot([point.x], [value], linestyle="none", zorder=3, **_looks(point.model, result))
    best = frontier.best
    axes.plot([p.x for p in best], [p.quality.value for p in best], color=BLUE, linewidth=0.9, alpha=0.7, zorder=1)
    teacher = next((point for point in frontier.points if point.model.is_teacher), None)
    if teacher is not None:
        axes.axhline(teacher.quality.value, color=INK, linewidth=1.2, linestyle=":", zorder=2)
    xs = [point.x for point in frontier.points]
    room = 0.18 * (max(xs) - min(xs)) or 0.5
    axes.set_xlim(max(min(xs) - room, 0 if frontier.axis == "cache" else -1e9), max(xs) + room * (2 if narrow else 1))
    ends = [end for p in frontier.points for end in (p.quality.value, p.quality.low, p.quality.high) if end is not None]
    margin = 0.08 * (max(ends) - min(ends)) or 0.05
    # A little beyond what accuracy can be, so that neither a mark nor the dotted line lies on the frame.
    axes.set_ylim(max(-margin / 2, min(ends) - margin), min(1 + margin / 2, max(ends) + margin))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    if frontier.axis == "cache":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_bytes(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 8, integer=frontier.axis == "mixers"))
    axes.set(xlabel=frontier.label, ylabel="accuracy")
    axes.grid(True, axis="both")
    _legend(figure, frontier, result, narrow)
    lay_out(figure)
    _write_labels(axes, frontier, result, num_layers, narrow)
    return figure


def _write_labels(axes: Axes, frontier: Frontier, result: str, num_layers: int, narrow: bool) -> None:
    """Each point's label beside it; the emphasised model and the teacher choose their place first."""
    to_pixels = axes.figure.dpi / 72
    lines = along(axes.transData.transform([(p.x, p.quality.value) for p in frontier.best]).tolist())
    obstacles = []
    for point in frontier.points:
        value, low, high = point.quality.value, point.quality.low, point.quality.high
        ends = (value if low is None else low, value if high is None else high)
        (x, y), (_, bottom), (_, top) = axes.transData.transform([(point.x, end) for end in (value, *ends)])
        obstacles.append((x - 2 * to_pixels, bottom, x + 2 * to_pixels, top))
        obstacles.append((x - 5 * to_pixels, y - 5 * to_pixels, x + 5 * to_pixels, y + 5 * to_pixels))
        if point.model.is_teacher:
            ends_of_line = axes.transData.transform([(end, value) for end in axes.get_xlim()])
            lines += along(ends_of_line.tolist())
    points = sorted(frontier.points, key=lambda point: (point.model.name != result, not point.model.is_teacher))
    place_labels(
        axes,
        [(point.x, point.quality.value) for point in points],
        [_label(point.model, num_layers, narrow) for point in points],
        obstacles,
        lines,
        ["bold" if point.model.name == result else "normal" for point in points],
        size=7.5 if narrow else 8,
    )


def _looks(model: Model, result: str) -> dict:
    if model.is_teacher:
        return {"marker": "*", "markersize": 14, "color": INK}
    if model.is_control:
        return {"marker": "X", "markersize": 8, "markerfacecolor": "white", "markeredgecolor": MUTED}
    if model.name == result:
        return {"marker": "o", "markersize": 10, "color": BLUE, "markeredgecolor": INK}
    return {"marker": "o", "markersize": 8, "color": SKY, "markeredgecolor": BLUE}


def _label(model: Model, num_layers: int, narrow: bool) -> str:
    """`H-12, 12 of 24 / 4.9M tokens`; what is unknown, or said already, is left out."""
    lines = [wrapped(model.label, narrow)]
    if model.num_mixers:
        mixers = f"{model.num_mixers} of {num_layers}" if num_layers else f"{model.num_mixers} mixers"
        if mixers not in model.label:
            lines.append(f"{mixers} mixers" if num_layers else mixers)
    if model.cumulative_tokens:
        lines.append(token_count(model.cumulative_tokens))
    return "\n".join(lines)


def _legend(figure: Figure, frontier: Frontier, result: str, narrow: bool) -> None:
    kinds = {"teacher": Model("teacher", ""), "result": Model(result, ""), "hybrid": Model("", "")}
    kinds["control"] = Model(" ", "", is_control=True)
    models = [point.model for point in frontier.points]
    plain = [model for model in models if not model.is_control and not model.is_teacher]
    present = {
        "teacher": any(model.is_teacher for model in models),
        "result": any(model.name == result for model in plain),
        "hybrid": any(model.name != result for model in plain),
        "control": any(model.is_control for model in models),
    }
    names = {"teacher": "teacher", "result": "the hybrid", "hybrid": "other hybrids", "control": "controls"}
    shown = [kind for kind in kinds if present[kind]]
    handles = [Line2D([], [], linestyle="none", **_looks(kinds[kind], result)) for kind in shown]
    figure.legend(handles, [names[kind] for kind in shown], loc="outside upper left", ncols=2 if narrow else 4)

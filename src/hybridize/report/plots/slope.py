"""The loss with each mixer as initialised and after a few steps, as slopes."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hybridize.report.measures import Ranking
from hybridize.report.plots.importance import MANY_PANELS, axis_of, in_blocks, title_panel
from hybridize.report.plots.labels import spread
from hybridize.report.plots.style import (
    BLUE,
    INK,
    MUTED,
    VERMILION,
    block_grid,
    cut,
    lay_out,
    new_figure,
    png,
    scale_for,
)
from hybridize.report.study import grouped

_LABEL_POINTS = 8.0
_LOG_FROM = 20


@png
def slope_chart(rankings: Sequence[Ranking], *, narrow: bool) -> Figure:
    """Per layer a line from the loss as initialised to the loss after training; chosen layers emphasised.

    Labelled are the extremes: the two lowest and the two highest ends, and the steepest fall.

    Args:
        rankings: those without values from before training are passed over.
        narrow: for a narrow screen.

    Returns:
        A PNG.
    """
    shown = [ranking for ranking in rankings if ranking.slopes]
    many = len(shown) > MANY_PANELS
    columns = 1 if narrow else 3 if many else min(2, len(shown))
    shown = in_blocks(shown) if many else shown
    blocks = [len(block) for block in grouped(shown, lambda ranking: ranking.series).values()] if many else [len(shown)]
    rows = sum(-(-block // columns) for block in blocks)
    height = 2.3 if many else 2.9 if narrow or columns > 1 else 3.6
    figure = new_figure(0.55 + height * rows, narrow)
    panels = block_grid(figure, blocks, columns)
    for axes, ranking in zip(panels, shown, strict=True):
        alike = [other for other in shown if axis_of(other) == axis_of(ranking)]
        values = [value for other in alike for _, *ends in other.slopes for value in ends]
        _lines(axes, ranking)
        logarithmic = scale_for(axes, values, _LOG_FROM)
        if logarithmic:
            axes.set_ylim(min(values) / 1.6, max(values) * 1.6)
        else:
            axes.set_ylim(top=max(values) * 1.08 if max(values) > 0 else None)
        axes.set_xticks((0, 1), _ends(ranking, many), fontsize=7.5 if many else 9)
        title_panel(axes, ranking, many)
        first = axes.get_subplotspec().is_first_col()
        axes.set_ylabel(cut(f"loss, {ranking.unit}", 36) if first or not many else "")
        # Room for the labels on the right; one panel alone need not be as flat as the page is wide.
        wide_alone = len(shown) == 1 and not narrow
        axes.set_xlim((-0.35, 1.75) if wide_alone else (-0.15, 2.3 if many else 1.8))
        axes.tick_params(axis="x", length=0)
        axes.spines["bottom"].set_bounds(0, 1)
        axes.grid(True, axis="y")
    handles = [
        Line2D([], [], color=VERMILION, linewidth=2.2, marker="o", markersize=4.5),
        Line2D([], [], color=BLUE, linewidth=0.9, linestyle=(0, (4, 2)), marker="o", markersize=3.5, mfc="white"),
    ]
    figure.legend(handles, ["chosen to be replaced", "kept"], loc="outside upper left", ncols=2)
    lay_out(figure)
    for axes, ranking in zip(panels, shown, strict=True):
        _write_labels(axes, ranking, 7.0 if many else _LABEL_POINTS)
    return figure


def _ends(ranking: Ranking, many: bool) -> tuple[str, str]:
    """What stands below the two ends of a line; on two lines in small panels."""
    steps = f"{ranking.steps:,} step{'s' if ranking.steps != 1 else ''}" if ranking.steps is not None else "training"
    gap = "\n" if many else " "
    return f"as{gap}initialised", f"after{gap}{steps}"


def _lines(axes: Axes, ranking: Ranking) -> None:
    for layer, before, after in sorted(ranking.slopes, key=lambda slope: slope[0] in ranking.chosen):
        if layer in ranking.chosen:
            looks = {"color": VERMILION, "linewidth": 2.0, "markersize": 4.5, "zorder": 3}
        else:
            looks = {
                "color": BLUE,
                "linewidth": 0.9,
                "linestyle": (0, (4, 2)),
                "markersize": 3.5,
                "markerfacecolor": "white",
            }
        axes.plot((0, 1), (before, after), marker="o", **looks)


def extremes(ranking: Ranking) -> list[int]:
    """Layers worth a label: the lowest two and the highest two after training, and the steepest fall."""
    by_end = [layer for layer, _, _ in sorted(ranking.slopes, key=lambda slope: slope[2])]
    steepest = max(ranking.slopes, key=lambda slope: slope[1] - slope[2])[0]
    return list(dict.fromkeys([*by_end[:2], *by_end[-2:], steepest]))


def _write_labels(axes: Axes, ranking: Ranking, size: float) -> None:
    """`layer 3: 0.0029` at the end of the lines of the extremes, moved apart where they would touch."""
    ends = {layer: after for layer, _, after in ranking.slopes}
    layers = extremes(ranking)
    to_points = 72.0 / axes.figure.dpi
    heights = [axes.transData.transform((1, ends[layer]))[1] * to_points for layer in layers]
    for layer, height, moved in zip(layers, heights, spread(heights, 1.35 * size), strict=True):
        chosen = layer in ranking.chosen
        note = axes.annotate(
            f"layer {layer}: {ends[layer]:.3g}",
            (1, ends[layer]),
            (14, moved - height),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=size,
            fontweight="bold" if chosen else "normal",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            annotation_clip=False,
        )
        note.set_in_layout(False)

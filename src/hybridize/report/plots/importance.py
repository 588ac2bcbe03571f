"""Which layers matter: bars of importance, and strips of what each ranking replaces."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hybridize.report.measures import Ranking
from hybridize.report.plots.style import (
    BLUE,
    INK,
    MUTED,
    PALE,
    RULE,
    VERMILION,
    cut,
    grid,
    layer_ticks,
    new_figure,
    png,
    wrapped,
)

_HATCH = "//////"
_LOG_FROM = 50


def panel_title(ranking: Ranking) -> str:
    """A ranking's name among others: its stage and its method."""
    return f"{ranking.stage}: {ranking.method}" if ranking.stage else ranking.method


@png
def importance_chart(rankings: Sequence[Ranking], *, narrow: bool) -> Figure:
    """Importance of each layer, bars per ranking; layers it would replace are hatched, mixers stand as grey fields.

    Rankings of one method and unit share their axis, so that stages can be compared. Scores that span more than a
    factor of 50 are drawn on a logarithmic axis.

    Args:
        rankings: those without any score are passed over.
        narrow: for a narrow screen.

    Returns:
        A PNG.
    """
    shown = [ranking for ranking in rankings if ranking.is_scored]
    columns = 1 if narrow or len(shown) < 3 else 2
    rows = -(-len(shown) // columns)
    figure = new_figure(0.75 + (1.55 if narrow or columns == 2 else 1.9) * rows, narrow)
    for index, (axes, ranking) in enumerate(zip(grid(figure, len(shown), columns), shown, strict=True)):
        alike = [other for other in shown if (other.method, other.unit) == (ranking.method, ranking.unit)]
        scores = [score for other in alike for score in other.scores if score is not None]
        floor = log_floor(scores)
        if floor is not None:
            axes.set_yscale("log")
            axes.set_ylim(floor, max(scores) * 1.4)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            low, high = min([0.0, *scores]), max([0.0, *scores])
            room = 0.06 * (high - low or 1.0)
            axes.set_ylim(low - room if low < 0 else 0.0, high + room)
            axes.axhline(0, color=MUTED, linewidth=0.8)
        _bars(axes, ranking)
        axes.set(title=cut(panel_title(ranking), 40), ylabel=cut(ranking.unit, 24))
        axes.set_xlim(-0.7, len(ranking.scores) - 0.3)
        axes.set_xticks(layer_ticks(len(ranking.scores), narrow or columns == 2))
        axes.tick_params(axis="x", length=0)
        axes.grid(True, axis="y")
        if index >= len(shown) - columns:
            axes.set_xlabel("layer")
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=BLUE, edgecolor=BLUE),
        Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=VERMILION, hatch=_HATCH),
    ]
    names = ["attention kept", "replaced"]
    if any(ranking.replaced for ranking in shown):
        handles.append(Rectangle((0, 0), 1, 1, facecolor=PALE, edgecolor=RULE))
        names.append("a mixer already")
    figure.legend(handles, names, loc="outside upper left", ncols=2 if narrow else 3)
    return figure


def _bars(axes: Axes, ranking: Ranking) -> None:
    for layer, score in enumerate(ranking.scores):
        if layer in ranking.replaced:
            axes.axvspan(layer - 0.46, layer + 0.46, facecolor=PALE, edgecolor="none", zorder=0)
        elif score is None:
            axes.annotate(
                "none",
                (layer, 0),
                (0, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=6.5,
                color=MUTED,
                rotation=90,
            )
        else:
            chosen = layer in ranking.chosen
            axes.bar(
                layer,
                score,
                width=0.74,
                color="white" if chosen else BLUE,
                edgecolor=VERMILION if chosen else BLUE,
                hatch=_HATCH if chosen else None,
                linewidth=0.9,
            )


def log_floor(scores: Sequence[float | None]) -> float | None:
    """Where a logarithmic axis should begin; None where a linear one shows every bar well."""
    known = [score for score in scores if score is not None]
    if min(known) <= 0 or max(known) < _LOG_FROM * min(known):
        return None
    return min(known) / 2


@png
def layer_strips(rankings: Sequence[Ranking], *, narrow: bool) -> Figure:
    """Which layers each ranking replaces, one strip per ranking; within a stage controls stand below, in grey.

    A filled cell is replaced; the number in it is its place in the order, 1 being the least important. A small square
    is a mixer already.

    Args:
        rankings: methods and controls.
        narrow: for a narrow screen.

    Returns:
        A PNG.
    """
    num_layers = len(rankings[0].scores)
    stages = list(dict.fromkeys(ranking.stage for ranking in rankings))
    strips = sorted(rankings, key=lambda ranking: (stages.index(ranking.stage), ranking.is_control))
    gaps = [sum(stages.index(strip.stage) for strip in strips[at : at + 1]) * 0.35 for at in range(len(strips))]
    places = [row + gap for row, gap in enumerate(gaps)]
    room = (2.0 if narrow else 5.6) / num_layers
    figure = new_figure(0.6 + (0.42 if narrow else 0.34) * (places[-1] + 1), narrow)
    axes = figure.subplots()
    for place, ranking in zip(places, strips, strict=True):
        for layer in range(num_layers):
            if layer in ranking.replaced:
                axes.add_patch(Rectangle((layer - 0.17, place - 0.14), 0.34, 0.28, facecolor=MUTED, linewidth=0))
                continue
            chosen = layer in ranking.chosen
            fill = (MUTED if ranking.is_control else VERMILION) if chosen else PALE
            axes.add_patch(Rectangle((layer - 0.44, place - 0.36), 0.88, 0.72, facecolor=fill, linewidth=0))
            if chosen and layer in ranking.order:
                number = str(ranking.order.index(layer) + 1)
                size = min(7.5, 72 * room / (0.75 * len(number) + 0.4))
                if size < 5:
                    continue
                axes.text(layer, place, number, ha="center", va="center_baseline", color="white", fontsize=size)
    labels = [panel_title(strip) + (" (control)" if strip.is_control else "") for strip in strips]
    axes.set_yticks(places, [wrapped(label, narrow) for label in labels], fontsize=8 if narrow else 8.5)
    axes.set_xticks(layer_ticks(num_layers, narrow))
    axes.set(xlim=(-0.6, num_layers - 0.4), ylim=(places[-1] + 0.5, -0.5), xlabel="layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for label, strip in zip(axes.get_yticklabels(), strips, strict=True):
        label.set_color(MUTED if strip.is_control else INK)
    return figure

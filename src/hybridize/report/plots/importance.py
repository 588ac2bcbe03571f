"""Which layers matter: bars of importance, and strips of what each ranking replaces."""

import textwrap
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
    block_grid,
    cut,
    layer_ticks,
    new_figure,
    png,
    wrapped,
)
from hybridize.report.study import grouped

_HATCH = "//////"
_LOG_FROM = 50

MANY_PANELS = 6
"""More than so many rankings get small panels, each series in rows of its own."""

MANY_STRIPS = 18
"""More than so many strips have a block for each series, with the controls of its first stage only."""


@png
def importance_chart(rankings: Sequence[Ranking], *, narrow: bool) -> Figure:
    """Importance of each layer, bars per ranking; layers it would replace are hatched, mixers stand as grey fields.

    Rankings of one series, method and unit share their axis, so that stages can be compared. Scores that span more than
    a factor of 50 are drawn on a logarithmic axis.

    Args:
        rankings: those without any score are passed over.
        narrow: for a narrow screen.

    Returns:
        A PNG.
    """
    shown = [ranking for ranking in rankings if ranking.is_scored]
    columns = panel_columns(len(shown), narrow)
    many = len(shown) > MANY_PANELS
    shown = in_blocks(shown) if many else shown
    blocks = [len(block) for block in grouped(shown, lambda ranking: ranking.series).values()] if many else [len(shown)]
    rows = sum(-(-block // columns) for block in blocks)
    figure = new_figure(0.75 + (1.55 if narrow or columns > 1 else 1.9) * rows, narrow)
    for axes, ranking in zip(block_grid(figure, blocks, columns), shown, strict=True):
        alike = [other for other in shown if axis_of(other) == axis_of(ranking)]
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
        title_panel(axes, ranking, many, 22 if narrow and many else 36)
        first = axes.get_subplotspec().is_first_col()
        axes.set_ylabel(cut(ranking.unit, 24) if first or not many else "")
        axes.set_xlim(-0.7, len(ranking.scores) - 0.3)
        ticks = layer_ticks(len(ranking.scores) * (2 if many else 1), narrow or columns > 1)
        axes.set_xticks([tick for tick in ticks if tick < len(ranking.scores)])
        axes.tick_params(axis="x", length=0)
        axes.grid(True, axis="y")
        if axes.get_subplotspec().rowspan.stop == rows or (len(blocks) == 1 and _is_lowest(axes, len(shown), columns)):
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


def axis_of(ranking: Ranking) -> tuple[str, str, str]:
    """What rankings that share a y axis have in common."""
    return ranking.series, ranking.method, ranking.unit


def _is_lowest(axes: Axes, count: int, columns: int) -> bool:
    """Whether no panel stands below it, in rows of `columns`."""
    place = axes.get_subplotspec()
    return place.rowspan.start * columns + place.colspan.start >= count - columns


def panel_columns(count: int, narrow: bool) -> int:
    """How many panels of rankings stand side by side."""
    if narrow:
        return 2 if count > MANY_PANELS else 1
    return 3 if count > MANY_PANELS else 2 if count > 2 else 1


def in_blocks(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Each series' rankings together, in their order of appearance."""
    return [ranking for block in grouped(rankings, lambda ranking: ranking.series).values() for ranking in block]


def title_panel(axes: Axes, ranking: Ranking, many: bool, room: int = 36) -> None:
    """A ranking's title; in small panels what it was made for stands above its rule; `room` is in letters."""
    if ranking.stage and (many or len(ranking.title) > 40):
        axes.set_title(
            "\n".join(textwrap.wrap(ranking.stage, room) + textwrap.wrap(ranking.rule, room)), fontsize=8 if many else 9
        )
    else:
        axes.set_title(cut(ranking.title, room if many else 40), fontsize=8 if many else 9)


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


def shown_strips(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Rankings worth a strip: those that choose layers; of very many, controls of a series for its first stage only."""
    shown = [ranking for ranking in rankings if ranking.chosen] or list(rankings)
    if len(shown) > MANY_STRIPS:
        shown = [ranking for ranking in shown if not (ranking.is_control and ranking.series and ranking.replaced)]
        alike = grouped(shown, lambda r: (r.method, r.chosen, r.order, r.replaced) if r.is_control else id(r))
        shown = [same[0] for same in alike.values()]
    return shown


def _block(ranking: Ranking, many: bool) -> str:
    return ranking.series or ranking.stage if many else ranking.stage


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
    # Many strips have a block for each series, as long as it is, instead of one for each stage.
    many = len(rankings) > MANY_STRIPS
    blocks = list(dict.fromkeys(_block(ranking, many) for ranking in rankings))
    strips = sorted(rankings, key=lambda ranking: (blocks.index(_block(ranking, many)), ranking.is_control))
    places = [row + 0.35 * blocks.index(_block(strip, many)) for row, strip in enumerate(strips)]
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
    labels = [strip.title + (" (control)" if strip.is_control else "") for strip in strips]
    axes.set_yticks(places, [wrapped(label, narrow) for label in labels], fontsize=8 if narrow else 8.5)
    axes.set_xticks(layer_ticks(num_layers, narrow))
    axes.set(xlim=(-0.6, num_layers - 0.4), ylim=(places[-1] + 0.5, -0.5), xlabel="layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for label, strip in zip(axes.get_yticklabels(), strips, strict=True):
        label.set_color(MUTED if strip.is_control else INK)
    return figure

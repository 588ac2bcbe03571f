"""The plots: each takes a part of the report's data and returns a PNG.

White card, Okabe-Ito colours (safe for colour-blind eyes), and a hatch, marker or line style beside every
colour, so that a grey print says the same. The same data give the same bytes. No pyplot: nothing global is
left behind.
"""

import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator, PercentFormatter

from hybridize.report.data import CacheMemory, Evaluation, LossCurve, Ranking, break_even_tokens
from hybridize.report.summary import short_bytes, short_count

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)
INK, MUTED, RULE, PALE = "#1f2328", "#656d76", "#d8dee4", "#eceff2"
MODEL_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, YELLOW)
CONTROL_COLOURS = ("#8c959f", "#b6bec6", "#6e7781", "#d0d7de")
MODEL_HATCHES = ("", "...", "\\\\\\", "++", "///", "oo", "--")
CONTROL_HATCHES = ("////", "xxxx", "||||", "....")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":")
WIDTH_INCHES, DPI = 8.0, 160

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def _png(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """Turn a function that draws a figure into one that returns its PNG, whatever the user's own settings."""

    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> bytes:
        defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
        with matplotlib.rc_context({**defaults, **_STYLE}):
            figure = draw(*args, **kwargs)
            FigureCanvasAgg(figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    drawn.__annotations__["return"] = bytes
    return drawn


@_png
def importance_chart(rankings: Sequence[Ranking]) -> Figure:
    """Importance of each layer, one row of bars per method; the layers it would replace are hatched.

    Scores that span more than a factor of 50 are drawn on a logarithmic axis.

    Args:
        rankings: the methods to draw; those without any score are passed over.

    Returns:
        A PNG, 8 inches wide.
    """
    shown = [ranking for ranking in rankings if any(score is not None for score in ranking.scores)]
    figure = Figure(figsize=(WIDTH_INCHES, 0.5 + 1.9 * len(shown)), layout="constrained")
    for row, (axes, ranking) in enumerate(zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True)):
        for layer, score in enumerate(ranking.scores):
            if score is None:
                axes.annotate(
                    "none",
                    (layer, 0),
                    (0, 4),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=6.5,
                    color=MUTED,
                    rotation=90,
                )
                continue
            chosen = layer in ranking.chosen
            axes.bar(
                layer,
                score,
                width=0.74,
                color="white" if chosen else BLUE,
                edgecolor=VERMILION if chosen else BLUE,
                hatch="//////" if chosen else None,
                linewidth=0.9,
            )
        floor = _log_floor(ranking.scores)
        if floor is None:
            axes.axhline(0, color=MUTED, linewidth=0.8)
        else:
            axes.set_yscale("log")
            axes.set_ylim(bottom=floor)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(title=ranking.method, ylabel=ranking.unit, xlim=(-0.7, len(ranking.scores) - 0.3))
        axes.set_xticks(_layer_ticks(len(ranking.scores)))
        axes.tick_params(axis="x", length=0)
        axes.grid(True, axis="y")
        if row == len(shown) - 1:
            axes.set_xlabel("layer")
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=BLUE, edgecolor=BLUE),
        Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=VERMILION, hatch="//////"),
    ]
    figure.legend(handles, ["attention kept", "replaced"], loc="outside upper left", ncols=2)
    return figure


def _log_floor(scores: Sequence[float | None]) -> float | None:
    """Where a logarithmic axis should begin; None where a linear one shows every bar well."""
    known = [score for score in scores if score is not None]
    if min(known) <= 0 or max(known) < 50 * min(known):
        return None
    return min(known) / 2


@_png
def layer_strips(rankings: Sequence[Ranking]) -> Figure:
    """Which layers each ranking replaces, one strip per ranking, controls below in grey.

    A filled cell is replaced; the number in it is its place in the order, 1 being the least important.

    Args:
        rankings: methods and controls.

    Returns:
        A PNG, 8 inches wide.
    """
    num_layers = len(rankings[0].scores)
    strips = sorted(rankings, key=lambda ranking: ranking.is_control)
    figure = Figure(figsize=(WIDTH_INCHES, 0.55 + 0.34 * len(strips)), layout="constrained")
    axes = figure.subplots()
    for row, ranking in enumerate(strips):
        for layer in range(num_layers):
            chosen = layer in ranking.chosen
            fill = (MUTED if ranking.is_control else VERMILION) if chosen else PALE
            axes.add_patch(Rectangle((layer - 0.44, row - 0.36), 0.88, 0.72, facecolor=fill, linewidth=0))
            if chosen and layer in ranking.order:
                place = str(ranking.order.index(layer) + 1)
                size = 7.5 if num_layers <= 40 else 5
                axes.text(layer, row, place, ha="center", va="center_baseline", color="white", fontsize=size)
    labels = [f"{ranking.method} (control)" if ranking.is_control else ranking.method for ranking in strips]
    axes.set_yticks(range(len(strips)), labels)
    axes.set_xticks(_layer_ticks(num_layers))
    axes.set(xlim=(-0.6, num_layers - 0.4), ylim=(len(strips) - 0.5, -0.5), xlabel="layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


@_png
def loss_chart(curves: Sequence[LossCurve]) -> Figure:
    """Loss in nat per token against tokens trained on; controls grey; logarithmic where the range is wide."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (curve, colour) in enumerate(_coloured(curves)):
        axes.plot(
            curve.tokens,
            curve.losses_nats,
            color=colour,
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            linewidth=1.8,
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            markevery=max(1, len(curve.tokens) // 12),
            label=f"{curve.label} (control)" if curve.is_control else curve.label,
        )
    values = [loss for curve in curves for loss in curve.losses_nats]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=min([0.0, *values]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set(xlabel="tokens", ylabel="loss, nat/token")
    axes.grid(True, axis="y")
    figure.legend(loc="outside upper left", ncols=min(3, max(1, len(curves))))
    return figure


@_png
def accuracy_chart(evaluations: Sequence[Evaluation]) -> Figure:
    """Accuracy of every model, overall and by task, with 95% intervals; controls grey and hatched."""
    tasks = list(dict.fromkeys(task for entry in evaluations for task in entry.tasks))
    groups = ["overall", *tasks]
    figure = Figure(figsize=(WIDTH_INCHES, 3.9), layout="constrained")
    axes = figure.subplots()
    width = 0.82 / len(evaluations)
    for index, (entry, colour) in enumerate(_coloured(evaluations)):
        scores = [(0, entry.overall)] + [(1 + tasks.index(task), score) for task, score in entry.tasks.items()]
        places = [group + (index - (len(evaluations) - 1) / 2) * width for group, _ in scores]
        heights = [score.accuracy for _, score in scores]
        hatches = CONTROL_HATCHES if entry.is_control else MODEL_HATCHES
        hatch = hatches[sum(e.is_control == entry.is_control for e in evaluations[:index]) % len(hatches)]
        below = [max(0.0, score.accuracy - score.low) for _, score in scores]
        above = [max(0.0, score.high - score.accuracy) for _, score in scores]
        axes.bar(
            places,
            heights,
            width=0.9 * width,
            color=colour,
            edgecolor=INK if entry.is_control else "white",
            linewidth=0.5,
            hatch=hatch,
            label=f"{entry.label} (control)" if entry.is_control else entry.label,
        )
        axes.errorbar(
            places,
            heights,
            yerr=[below, above],
            fmt="none",
            ecolor=INK,
            elinewidth=0.9,
            capsize=min(3.0, 20 * width),
        )
    if tasks:
        axes.axvline(0.5, color=RULE, linewidth=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set(ylim=(0, 1), xlim=(-0.5, len(groups) - 0.5), ylabel="right answers")
    axes.grid(True, axis="y")
    figure.legend(loc="outside upper left", ncols=min(3, len(evaluations)))
    return figure


@_png
def memory_chart(models: Sequence[CacheMemory]) -> Figure:
    """Cache of one sequence against its length, both logarithmic; crossings with the first model marked.

    Args:
        models: the first is the baseline.

    Returns:
        A PNG, 8 inches wide; the axis begins at 1k tokens, or earlier where a crossing lies before.
    """
    crossings = [(model, break_even_tokens(models[0], model)) for model in models[1:]]
    first = min([1024.0, *(tokens / 2 for _, tokens in crossings if tokens is not None)])
    start = 1
    while 2 * start <= first:
        start *= 2
    contexts = [start]
    while contexts[-1] < 131072:
        contexts.append(2 * contexts[-1])
    figure = Figure(figsize=(WIDTH_INCHES, 3.4), layout="constrained")
    axes = figure.subplots()
    for index, model in enumerate(models):
        axes.plot(
            contexts,
            [model.bytes_at(context) for context in contexts],
            color=MODEL_COLOURS[index % len(MODEL_COLOURS)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            linewidth=1.8,
            label=model.label,
        )
    for model, tokens in crossings:
        if tokens is not None and tokens <= contexts[-1]:
            axes.plot(
                [tokens],
                [model.bytes_at(tokens)],
                linestyle="none",
                marker="o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=INK,
                label=f"{model.label}: smaller from {tokens:,.0f} tokens",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(contexts[:: 1 + len(contexts) // 10], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_binary(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_bytes(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="context, tokens", ylabel="cache of one sequence")
    axes.grid(True, axis="y")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _coloured(entries: Sequence[Any]) -> list[tuple[Any, str]]:
    """Each entry with its colour: models through the palette, controls through the greys."""
    colours, seen = [], {False: 0, True: 0}
    for entry in entries:
        palette = CONTROL_COLOURS if entry.is_control else MODEL_COLOURS
        colours.append((entry, palette[seen[entry.is_control] % len(palette)]))
        seen[entry.is_control] += 1
    return colours


def _layer_ticks(num_layers: int) -> list[int]:
    return list(range(0, num_layers, 1 if num_layers <= 28 else 2 if num_layers <= 56 else 4))


def _short_binary(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"

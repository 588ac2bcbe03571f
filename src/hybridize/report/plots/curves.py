"""Lines: the loss while training, and the cache of a growing sequence."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from hybridize.report.data import break_even_tokens
from hybridize.report.measures import CacheMemory, LossCurve
from hybridize.report.numbers import short_bytes, short_count
from hybridize.report.plots.style import INK, cut, grid, new_figure, png, scale_for, styled
from hybridize.report.study import grouped

_LOG_FROM = 20
_LAST_CONTEXT = 131072


@png
def loss_chart(curves: Sequence[LossCurve], *, narrow: bool) -> Figure:
    """Loss against tokens, one panel per kind and unit; controls grey; logarithmic where the range is wide."""
    groups = list(grouped(curves, lambda curve: (curve.kind, curve.unit)).values())
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


@png
def memory_chart(models: Sequence[CacheMemory], *, narrow: bool) -> Figure:
    """Cache of one sequence against its length, both logarithmic; crossings with the first model marked.

    Args:
        models: the first is the baseline.
        narrow: for a narrow screen.

    Returns:
        A PNG; the axis begins at 1k tokens, or earlier where a crossing lies before.
    """
    crossings = [(model, break_even_tokens(models[0], model)) for model in models[1:]]
    marked = [(model, tokens) for model, tokens in crossings if tokens is not None and tokens <= _LAST_CONTEXT]
    first = min([1024.0, *(tokens / 2 for _, tokens in marked)])
    contexts = [1]
    while 2 * contexts[0] <= first:
        contexts[0] *= 2
    while contexts[-1] < _LAST_CONTEXT:
        contexts.append(2 * contexts[-1])
    columns = 1 if narrow else 3
    figure = new_figure(2.7 + 0.2 * -(-(len(models) + bool(marked)) // columns), narrow)
    axes = figure.subplots()
    for model, looks in styled(models):
        sizes = [model.bytes_at(context) for context in contexts]
        axes.plot(contexts, sizes, label=cut(model.label, 44), **looks)
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


def _short_binary(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"

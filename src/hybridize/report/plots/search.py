"""The frontier of predicted loss over cost: mixed layouts beside single mixers and evenly spaced layers."""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from hybridize.report.measures import Search
from hybridize.report.numbers import TIMES
from hybridize.report.plots.style import INK, new_figure, png, styled

_LINEAR_SHARE = 1e-3
"""Of the largest loss, up to which the axis is linear: losses may be 0 or negative."""


@png
def search_chart(search: Search, *, narrow: bool) -> Figure:
    """Predicted loss over how many times less than the teacher a step costs; one line a rule, controls grey.

    Lines are stairs: between two layouts, whoever asks for a speed must take the faster one.

    Args:
        search: with at least one curve.
        narrow: for a narrow screen.

    Returns:
        A PNG; the chosen layout is ringed. Both axes are logarithmic, that of the loss but for what is close to 0.
    """
    columns = 1 if narrow else 3
    figure = new_figure(3.1 + 0.2 * -(-(len(search.curves) + 1) // columns), narrow)
    axes = figure.subplots()
    for curve, looks in styled(search.curves):
        label = f"{curve.label} (control)" if curve.is_control else curve.label
        xs, ys = [point.speedup for point in curve.points], [point.loss for point in curve.points]
        axes.plot(xs, ys, label=label, drawstyle="steps-pre", **looks)
    axes.plot(
        [search.chosen.speedup],
        [search.chosen.loss],
        linestyle="none",
        marker="o",
        markersize=12,
        markerfacecolor="none",
        markeredgecolor=INK,
        label="chosen",
    )
    largest = max(abs(point.loss) for curve in search.curves for point in curve.points)
    if largest:
        axes.set_yscale("symlog", linthresh=_LINEAR_SHARE * largest)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=f"{TIMES} cheaper than the teacher", ylabel=f"predicted loss, {search.unit}")
    axes.grid(True, axis="both")
    figure.legend(loc="outside upper left", ncols=columns)
    return figure

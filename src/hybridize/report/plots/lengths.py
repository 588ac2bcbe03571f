"""What a kernel costs per token against the number of tokens: a flat line is a linear cost."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from hybridize.report.plots.style import BLUE, VERMILION, new_figure, png


@png
def length_chart(records: Sequence[dict[str, Any]], *, narrow: bool) -> Figure:
    """Nanoseconds per token, forward and with gradients, both axes logarithmic.

    Args:
        records: of `hybridize.bench.lengths.measure_lengths`.
        narrow: for a narrow screen.

    Returns:
        A PNG.
    """
    figure = new_figure(2.9, narrow)
    axes = figure.subplots()
    lengths = [record["length"] for record in records]
    lines = (
        ("forward_backward", "forward and backward", VERMILION, "s", "--"),
        ("forward", "forward", BLUE, "o", "-"),
    )
    highest = 0.0
    for name, label, colour, marker, style in lines:
        costs = [record[f"{name}_ns_per_token"] for record in records]
        highest = max(highest, *costs)
        axes.plot(lengths, costs, color=colour, marker=marker, linestyle=style, label=label)
        for length, cost in zip(lengths, costs, strict=True):
            axes.annotate(f"{cost:,.0f}", (length, cost), (0, 5), textcoords="offset points", ha="center", fontsize=7.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(0, 1.2 * highest)
    axes.set(xlabel="tokens of one sequence", ylabel="ns per token")
    axes.grid(True, axis="y")
    figure.legend(loc="outside upper left", ncols=2)
    return figure

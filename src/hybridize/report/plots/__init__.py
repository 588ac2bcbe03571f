"""The plots, one module per figure: each takes a part of the report's data and returns a PNG.

White card, Okabe-Ito colours (safe for colour-blind eyes), and a hatch, marker, line style or label beside every
colour, so that a grey print says the same. Each is drawn twice, for wide and for narrow screens, so that letters are
as large on both. The same data give the same bytes. No pyplot: nothing global is left behind.
"""

from hybridize.report.plots.bars import score_chart, task_chart, throughput_chart
from hybridize.report.plots.curves import loss_chart, memory_chart
from hybridize.report.plots.frontier import frontier_chart
from hybridize.report.plots.importance import importance_chart, layer_strips
from hybridize.report.plots.lengths import length_chart
from hybridize.report.plots.search import search_chart
from hybridize.report.plots.slope import slope_chart

__all__ = [
    "frontier_chart",
    "importance_chart",
    "layer_strips",
    "length_chart",
    "loss_chart",
    "memory_chart",
    "score_chart",
    "search_chart",
    "slope_chart",
    "task_chart",
    "throughput_chart",
]

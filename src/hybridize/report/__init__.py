"""From what a run measured to what a person looks at: one self-contained HTML page and its PNG plots.

The pipeline fills a `ReportData` from its artifacts; `write_report` draws it, `console_summary` prints the
short form. Nothing here computes a result: every number shown was measured elsewhere, or follows from those
by a line of arithmetic.
"""

from hybridize.report.data import TEACHER, Model, ReportData, TokenSpend
from hybridize.report.measures import (
    CacheMemory,
    Evaluation,
    HarnessScore,
    LossCurve,
    MeasuredLoss,
    Merge,
    Ranking,
    Score,
    Search,
    SearchCurve,
    SearchPoint,
    Serving,
    StageCost,
    TextScore,
    Throughput,
    Traces,
)
from hybridize.report.page import render_page, write_report
from hybridize.report.summary import console_summary, headline

__all__ = [
    "TEACHER",
    "CacheMemory",
    "Evaluation",
    "HarnessScore",
    "LossCurve",
    "MeasuredLoss",
    "Merge",
    "Model",
    "Ranking",
    "ReportData",
    "Score",
    "Search",
    "SearchCurve",
    "SearchPoint",
    "Serving",
    "StageCost",
    "TextScore",
    "Throughput",
    "TokenSpend",
    "Traces",
    "console_summary",
    "headline",
    "render_page",
    "write_report",
]

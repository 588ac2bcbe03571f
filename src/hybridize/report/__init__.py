"""From what a run measured to what a person looks at: one self-contained HTML page and its PNG plots.

The pipeline fills a `ReportData` from its artifacts; `write_report` draws it, `console_summary` prints the
short form. Nothing here computes a result: every number shown was measured elsewhere, or follows from those
by a line of arithmetic.
"""

from hybridize.report.data import (
    CacheMemory,
    Evaluation,
    LossCurve,
    Ranking,
    ReportData,
    Score,
    StageCost,
)
from hybridize.report.page import render_page, write_report
from hybridize.report.summary import console_summary, headline

__all__ = [
    "CacheMemory",
    "Evaluation",
    "LossCurve",
    "Ranking",
    "ReportData",
    "Score",
    "StageCost",
    "console_summary",
    "headline",
    "render_page",
    "write_report",
]

"""A search is drawn with its controls, and what was predicted stands beside what was measured."""

from dataclasses import replace

import pytest

from hybridize.report import MeasuredLoss, ReportData, Search, SearchCurve, SearchPoint, render_page
from hybridize.report.figures import draw_plots
from hybridize.report.plots import search_chart


def point(layout, loss, speedup):
    return SearchPoint(layout, sum(letter != "a" for letter in layout), loss, 100 / speedup, speedup, 2)


CHOSEN = point("am2a", 0.03125, 1.75)
SEARCH = Search(
    name="mix",
    layout="am2a",
    meanings={"a": "attention", "m": "mamba1", "2": "mamba2"},
    chosen=CHOSEN,
    curves=(
        SearchCurve("best layout", (point("aaaa", 0.0, 1), CHOSEN, point("mm2a", 0.5, 2.5))),
        SearchCurve("mamba1 only", (point("aaaa", 0.0, 1), point("amma", 0.25, 1.75))),
        SearchCurve("mamba1, evenly spaced", (point("aaaa", 0.0, 1), point("amam", 1.5, 1.75)), is_control=True),
    ),
    verdict="Mixtures win at 1 of 3 costs.",
    is_exact=True,
    method="perplexity",
    unit="nat/token",
    cost_unit="bytes a step",
    measured=(MeasuredLoss("distill", 0.625, 0.0078125, 4096),),
)
DATA = ReportData("title", "2026", "teacher", ("attention",) * 4, searches=(SEARCH,))


def test_page_shows_prediction_beside_measurement():
    page = render_page(DATA)
    assert "A mixer for each layer" in page
    assert "Mixtures win at 1 of 3 costs." in page
    row = page.partition("Measured, first step")[2].partition("</tr>")[2].partition("</tr>")[0]
    assert [number in row for number in ("0.03125", "0.625", "0.007812")] == [True, True, True]
    assert page.count("<code>am2a</code>") == 2


def test_plot_says_in_words_what_it_draws():
    plot = draw_plots(DATA)["search"]
    assert "mamba1 only up to 1.75 times as cheap at 0.25 nat/token" in plot.alt
    assert plot.alt.endswith("Chosen: am2a.")
    assert "Losses are predicted" in plot.caption


def test_several_searches_have_a_picture_each():
    twice = replace(DATA, searches=(SEARCH, replace(SEARCH, name="other")))
    assert {"search", "search-2"} <= draw_plots(twice).keys()
    page = render_page(twice)
    assert "A mixer for each layer: mix" in page
    assert "A mixer for each layer: other" in page


@pytest.mark.parametrize("shift", [0.0, -0.5])
@pytest.mark.parametrize("narrow", [False, True])
def test_chart_takes_losses_of_either_sign(shift, narrow):
    curves = tuple(
        replace(curve, points=tuple(replace(p, loss=p.loss * (shift or 1)) for p in curve.points))
        for curve in SEARCH.curves
    )
    chart = search_chart(replace(SEARCH, curves=curves), narrow=narrow)
    assert chart.startswith(b"\x89PNG")
    assert chart != search_chart(SEARCH, narrow=not narrow)
    nothing = tuple(replace(curve, points=tuple(replace(p, loss=0.0) for p in curve.points)) for curve in curves)
    assert search_chart(replace(SEARCH, curves=nothing), narrow=narrow).startswith(b"\x89PNG")

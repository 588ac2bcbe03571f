"""With fifty models every picture stays legible: few labels, none over another, panels of few curves, told apart."""

from dataclasses import replace
from itertools import combinations, pairwise

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from reading import Page, plain
from report_example import example
from report_study import CONTROLS, COUNTS, SEEDED, SERIES, losses, memory, rankings, study, with_throughput

from hybridize.report import plots, render_page
from hybridize.report.figures import MAX_PANELS, draw_plots
from hybridize.report.plots.curves import MAX_CURVES, loss_panels, memory_shown
from hybridize.report.plots.frontier import MANY, MAX_LABELS, labelled
from hybridize.report.plots.importance import shown_strips
from hybridize.report.plots.labels import place_labels
from hybridize.report.plots.style import _STYLE
from hybridize.report.study import arranged, frontier, suites

RESULT = "SFT,-merged"


def figure_of(chart, *args, narrow=False):
    """The figure that a chart draws, laid out, before it becomes a PNG."""
    with matplotlib.rc_context(_STYLE):
        figure = chart.__wrapped__(*args, narrow=narrow)
        figure.canvas.draw()
    return figure


def boxes(artists):
    return [artist.get_window_extent() for artist in artists]


def overlapping(found):
    """Pairs of boxes that share more than a hair."""
    shared = [Bbox.intersection(one, other) for one, other in combinations(found, 2)]
    return [box for box in shared if box is not None and box.width > 0.5 and box.height > 0.5]


def within(found, frame):
    return all(
        frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1 and frame.y0 - 1 <= box.y0 and box.y1 <= frame.y1 + 1
        for box in found
    )


def with_long_labels(place):
    """The same place with labels of three lines."""

    def longer(model):
        told = model.is_teacher or model.name == RESULT
        return model if told else replace(model, label=f"{model.label}, with a label that goes on and on, and on again")

    return replace(place, points=tuple(replace(point, model=longer(point.model)) for point in place.points))


PLACES = {
    "long labels": with_long_labels(frontier(study("tied"))),
    "mixers": frontier(study()),
    "ties": frontier(study("tied")),
    "throughput": frontier(with_throughput(study())),
}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_frontier_of_a_crowd_has_few_labels_apart_and_inside(place, narrow):
    assert len(place.points) > 40
    figure = figure_of(plots.frontier_chart, place, RESULT, 16, narrow=narrow)
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    numbers = [text for text in texts if text.isdigit()]
    assert 4 <= len(texts) - len(numbers) <= MAX_LABELS
    assert len(numbers) <= 2 * len(COUNTS)
    assert not overlapping(boxes(axes.texts))
    assert within(boxes(axes.texts), axes.get_window_extent())
    assert not any("tokens" in text for text in texts)
    assert {"teacher", "SFT, merged"} <= {" ".join(text.split()) for text in texts}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_frontier_of_a_crowd_draws_each_series_as_a_line_and_names_it(place):
    figure = figure_of(plots.frontier_chart, place, RESULT, 16)
    lines = [line for line in figure.axes[0].lines if line.get_marker() not in ("", "None", None)]
    series = [line for line in lines if len(line.get_xdata()) == len(COUNTS)]
    assert len({line.get_color() for line in series}) == len(series) == len(SERIES)
    assert set(SERIES) <= {text.get_text() for text in figure.legends[0].get_texts()}
    assert len(figure.axes[0].containers) == len(labelled(place, RESULT, False)), "intervals of labelled points only"


def test_points_of_a_crowd_stay_near_their_place():
    figure = figure_of(plots.frontier_chart, PLACES["ties"], RESULT, 16)
    marks = [line for line in figure.axes[0].lines if line.get_marker() in ("*", "o", "X")]
    places = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in marks]
    assert all(min(abs(x - point.x) for point in PLACES["ties"].points) < 0.5 for x, _ in places)
    assert len(marks) > 20
    assert len(set(places)) == len(places)


def test_a_frontier_that_is_no_crowd_labels_every_point():
    place = frontier(study())
    few = replace(place, points=place.points[:MANY])
    figure = figure_of(plots.frontier_chart, few, RESULT, 16)
    assert len(figure.axes[0].texts) == MANY
    assert labelled(few, "h1-9", False)[0].model.name == "h1-9"


def test_loss_panels_hold_few_curves_and_each_curve_once():
    panels = loss_panels(losses())
    assert max(len(panel.curves) for panel in panels) <= MAX_CURVES
    assert sorted(c.name for panel in panels for c in panel.curves) == sorted(c.name for c in losses())
    named = {panel.name: panel for panel in panels}
    for name in SERIES:
        assert [curve.series for curve in named[name].curves] == [name] * len(COUNTS)
    assert all(len({curve.is_control for curve in panel.curves}) == 1 for panel in panels)
    of_seeds = [panel for panel in panels for curve in panel.curves if curve.label.startswith("one shot")]
    assert of_seeds == [of_seeds[0]] * 3


def test_few_curves_are_one_panel_a_kind():
    assert [panel.name for panel in loss_panels(example().losses)] == ["", "", ""]


@pytest.mark.parametrize("narrow", [False, True])
def test_loss_panels_of_a_kind_share_their_axis_and_legends_lie_apart(narrow):
    figure = figure_of(plots.loss_chart, losses(), narrow=narrow)
    panels = loss_panels(losses())
    assert len(figure.axes) == len(panels)
    limits = {panel.kind: set() for panel in panels}
    for axes, panel in zip(figure.axes, panels, strict=True):
        limits[panel.kind].add(axes.get_ylim())
    assert [len(found) for found in limits.values()] == [1, 1]
    legends = boxes(axes.get_legend() for axes in figure.axes)
    assert within(legends, figure.bbox)
    assert not overlapping([*legends, *boxes(figure.axes)])


def test_rankings_are_told_apart_and_fill_as_many_pictures_as_they_need(undrawn, monkeypatch):
    drawn_parts = {"importance_chart": [], "slope_chart": []}
    for chart, parts in drawn_parts.items():
        pixel = getattr(plots, chart)()
        monkeypatch.setattr(plots, chart, lambda part, parts=parts, pixel=pixel, **_: parts.append(part) or pixel)
    data = study()
    drawn = draw_plots(data)
    assert {"importance", "importance-2", "before_after", "before_after-2"} <= set(drawn)
    for parts in drawn_parts.values():
        once = parts[::2]
        assert [len(part) for part in once] == [2 * len(COUNTS), 4]
        assert max(map(len, once)) <= MAX_PANELS
        titles = [entry.title for part in once for entry in part]
        assert len(set(titles)) == len(titles)
    assert "h1, 9 of 16 layers: mmr would replace layer 8" in plain(drawn["importance"].alt)
    assert "mmr, mamba2, neutral would replace" in plain(drawn["importance-2"].alt)
    page = Page(render_page(data, drawn))
    assert len(page.images) == len(drawn)
    assert page.headings.count("Importance of each layer") == 1


@pytest.mark.parametrize("chart", [plots.importance_chart, plots.slope_chart])
@pytest.mark.parametrize("narrow", [False, True])
def test_titles_of_small_panels_do_not_touch(chart, narrow):
    part = [entry for entry in rankings() if entry.is_scored and entry.series]
    figure = figure_of(chart, part, narrow=narrow)
    titles = boxes(axes._left_title for axes in figure.axes)
    assert len(titles) == len(part)
    assert not overlapping(titles)
    assert within(titles, figure.bbox)


def test_strips_leave_out_what_says_nothing_new():
    shown = shown_strips(rankings())
    assert [entry.title for entry in shown if entry.is_control] == ["h1, 8 of 16 layers: uniform"]
    assert [entry for entry in shown if not entry.is_control] == [e for e in rankings() if not e.is_control]
    few = rankings()[:4]
    assert shown_strips(few) == few
    assert shown_strips([replace(few[0], chosen=()), few[1]]) == [few[1]]


def test_memory_of_many_shows_the_ends_of_a_series():
    shown = [model.label for model in memory_shown(memory())]
    ends = [f"{name}, {count} of 16 replaced" for name in SERIES for count in (8, 13)]
    assert shown == ["teacher", *ends, "10 of 16 replaced"]
    assert memory_shown(memory()[:8]) == list(memory()[:8])


def test_bars_stand_by_series_and_seeds_are_their_mean():
    suite = arranged(suites(study())[0], RESULT)
    rows = {row.model.label: row for row in suite.rows}
    groups = [row.model.series or ("control" if row.model.is_control else "") for row in suite.rows]
    assert list(dict.fromkeys(groups[1:])) == [*SERIES, "", "control"]
    assert sum(before != after for before, after in pairwise(groups)) == 4
    seeded = rows["control a, 3 seeds"].overall
    single = [r.overall.value for r in suites(study())[0].rows if r.model.label.startswith("control a")]
    assert list(seeded.seeds) == single
    assert seeded.value == pytest.approx(sum(single) / 3)
    assert (seeded.low, seeded.high) == (None, None)
    assert len(suite.rows) == len(suites(study())[0].rows) - 2 * len(SEEDED)
    assert {row.model.label for row in suite.rows if row.model.is_control} >= set(CONTROLS) - set(SEEDED)


def test_the_model_the_page_is_about_gives_its_seeds_their_name():
    suite = arranged(suites(study())[0], "one-shot,-seed-2")
    assert next(row.model.name for row in suite.rows if row.model.label == "one shot, 3 seeds") == "one-shot,-seed-2"


def test_rows_of_a_small_suite_stay_as_they_are():
    for suite in suites(example()):
        assert arranged(suite, "merge") == suite


def test_captions_of_a_crowd_say_what_is_seen(undrawn):
    drawn = draw_plots(study())
    words = {name: (plain(plot.alt), plain(plot.caption)) for name, plot in drawn.items()}
    assert "Lines: h1, gated delta net." in words["frontier"][0]
    assert "of labelled models only" in words["frontier"][1]
    assert "Tokens are those" not in words["frontier"][1]
    assert "one shot, 3 seeds" in words["accuracy"][0]
    assert "dots are the single seeds" in words["accuracy"][1]
    assert "Controls are in panels of their own" in words["loss"][1]
    assert "controls stand for its first stage only" in words["layers"][1]
    assert "Shaded" in words["memory"][1]
    assert not [name for name, plot in draw_plots(example()).items() if "seeds" in plot.caption]


def test_a_label_without_room_is_left_out_where_it_may_be():
    """Forty points in one place: as many labels as fit, none over another; or all of them."""
    for drop in (True, False):
        axes = Figure(figsize=(3, 2)).subplots()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        many = [(0.5, 0.5)] * 40
        place_labels(axes, many, [f"label {at}" for at in range(40)], [], [], ["normal"] * 40, drop=drop)
        found = boxes(axes.texts)
        assert (2 < len(found) < 40) if drop else len(found) == 40
        assert bool(overlapping(found)) is not drop
        assert within(found, axes.get_window_extent()) is drop

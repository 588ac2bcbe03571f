"""Each figure shows what it should, says so in words, looks the same anywhere, and marks what a reader must see."""

from dataclasses import replace
from itertools import pairwise

import matplotlib
import pytest
from PIL import ImageChops
from reading import plain, read_png
from report_example import example
from report_small import EMPTY, FULL, METHOD, TEACHER, UNIFORM

from hybridize.report import CacheMemory, Evaluation, Model, Ranking, Score, plots
from hybridize.report.figures import draw_plots
from hybridize.report.plots import labels
from hybridize.report.plots.importance import log_floor
from hybridize.report.plots.labels import along, spread
from hybridize.report.plots.slope import extremes
from hybridize.report.plots.style import NARROW_DPI, NARROW_INCHES, WIDE_DPI, WIDE_INCHES, layer_ticks
from hybridize.report.study import Frontier, FrontierPoint, Measure, frontier, suites


def test_the_example_has_every_figure(drawn):
    assert set(drawn) == {
        "accuracy",
        "accuracy-2",
        "before_after",
        "frontier",
        "importance",
        "layers",
        "loss",
        "memory",
        "tasks",
        "tasks-2",
        "throughput",
    }


def test_figures_fit_their_screen_and_are_not_blank(drawn):
    for name, plot in drawn.items():
        wide, narrow = read_png(plot.png), read_png(plot.narrow_png)
        assert wide.width == WIDE_INCHES * WIDE_DPI, name
        assert narrow.width == NARROW_INCHES * NARROW_DPI, name
        assert 150 < wide.height < 1500, name


def test_letters_are_as_large_on_a_phone_as_on_a_desk():
    # 9 points of a figure so many inches wide, shown 330 and 920 CSS pixels wide.
    on_phone, on_desk = 9 / 72 / NARROW_INCHES * 330, 9 / 72 / WIDE_INCHES * 920
    assert on_phone > 10
    assert on_desk > 12


@pytest.mark.parametrize(
    ("name", "alt", "caption"),
    [
        ("accuracy", ["teacher 84.0 %, 1.00 x the speed", "6 of 24, untrained 3.8 %;"], ["400 answers", "3 repeats"]),
        ("accuracy-2", ["12 of 24 61.5 %"], ["Mean accuracy over 2 tasks", "95% intervals", "controls"]),
        ("tasks", ["chains: teacher 71.0 %"], ["100 answers of each model in each", "95% intervals", "controls"]),
        ("tasks-2", ["gsm8k: teacher 81.2 %"], ["100 to 250 problems in each"]),
        ("frontier", ["16 of 24 56.0 % at 2.25 after 20.2M tokens"], ["batch of 32", "dotted line", "Crosses"]),
        ("throughput", ["batch of 8, 1,024", "6 of 24 1.21 x the speed"], ["median of the repeats"]),
        ("importance", ["6 of 24: MMR would replace layers 3, 5"], ["arXiv 2511.02651", "logarithmic"]),
        ("before_after", ["6 of 24: MMR: layer "], ["12 to 24 layers", "two lowest"]),
        ("layers", ["12 of 24: uniform: layers"], ["controls in grey", "mixers already"]),
        ("loss", ["random init from 9.974 to 2.433 nat/token"], ["controls in grey"]),
        ("memory", ["At 131072 tokens: teacher 12 GiB"], ["states of the mixers"]),
    ],
)
def test_a_figure_says_in_words_what_it_shows(drawn, name, alt, caption):
    plot = drawn[name]
    words = (plain(plot.alt), plain(plot.caption))
    assert all(part in words[0] for part in alt), words[0]
    assert all(part in words[1] for part in caption), words[1]


def test_a_caption_names_no_control_where_there_is_none(undrawn):
    data = example()
    without = replace(
        data,
        evaluations=tuple(entry for entry in data.evaluations if not entry.is_control),
        models=tuple(model for model in data.models if not model.is_control),
        rankings=tuple(entry for entry in data.rankings if not entry.is_control),
        losses=tuple(curve for curve in data.losses if not curve.is_control),
        harness=tuple(score for score in data.harness if score.model != "random-distill"),
    )
    assert not [plot.name for plot in draw_plots(without).values() if "ontrol" in plot.caption]


def test_plots_ignore_and_keep_the_users_matplotlib_settings():
    expected = plots.memory_chart(FULL.memory)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "savefig.dpi": 20}):
        assert plots.memory_chart(FULL.memory) == expected
        assert matplotlib.rcParams["font.size"] == 30


def test_plots_leave_the_users_backend_alone():
    before = matplotlib.get_backend()
    try:
        matplotlib.use("svg")
        plots.memory_chart(FULL.memory)
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)


def test_colours_are_told_apart_without_colour():
    """In grey, a chosen layer differs from a kept one, and a control's bar from a model's."""
    kept = Ranking("m", (1.0, 2.0), (0, 1), (), stage="s")
    assert _grey_difference(plots.importance_chart, [kept], [replace(kept, chosen=(0,))]) > 400
    sloped = replace(kept, before=(3.0, 4.0))
    assert _grey_difference(plots.slope_chart, [sloped], [replace(sloped, chosen=(0,))]) > 400
    point = FrontierPoint(Model("a", "a"), 1.5, Measure(0.5))
    place = Frontier("throughput", "x", (FrontierPoint(Model("teacher", "t"), 1.0, Measure(0.8)), point))
    other = replace(place, points=(place.points[0], replace(point, model=Model("a", "a", is_control=True))))
    assert _grey_difference(lambda f: plots.frontier_chart(f, "", 4), place, other) > 400


def _grey_difference(draw, one, other):
    """Pixels that differ clearly between two drawings in grey."""
    first, second = (read_png(draw(entry)).convert("L") for entry in (one, other))
    assert first.size == second.size
    return sum(ImageChops.difference(first, second).histogram()[60:])


def test_the_model_the_page_is_about_is_emphasised(drawn):
    data = example()
    suite, place = suites(data)[0], frontier(data)
    assert plots.task_chart(suite, "merge") == drawn["tasks"].png != plots.task_chart(suite, "h-6-distill")
    assert plots.frontier_chart(place, "merge", 24) == drawn["frontier"].png
    assert plots.frontier_chart(place, "h-6-distill", 24) != drawn["frontier"].png


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.9])
def test_the_teachers_dotted_line_is_seen_also_at_the_top(share, narrow):
    """Dots: a row of pixels, dark and light by turns, from one side of the frame to the other."""
    low, top = Measure(0.2, 0.1, 0.3), Measure(share, share - 0.01, share)
    points = (FrontierPoint(Model("teacher", "teacher"), 1.0, top), FrontierPoint(Model("a", "a"), 2.0, low))
    picture = read_png(plots.frontier_chart(Frontier("throughput", "x", points), "a", 4, narrow=narrow)).convert("L")
    rows = [picture.crop((0, y, picture.width, y + 1)).tobytes() for y in range(picture.height)]
    turns = [sum((one < 128) != (other < 128) for one, other in pairwise(row)) for row in rows]
    assert max(turns) > picture.width / 8


def test_memory_chart_marks_a_crossing_within_or_before_its_axis():
    baseline = CacheMemory("teacher", 1000, 0)
    for other in (
        CacheMemory("early", 500, 5_000),
        CacheMemory("late", 500, 5_000_000),
        CacheMemory("never", 1000, 1),
        CacheMemory("beyond", 999, 10**9),
    ):
        read_png(plots.memory_chart((baseline, other)))


def test_figures_stand_extreme_data():
    """No score above zero, one layer, equal points, negative and huge values: each is drawn without a warning."""
    nothing = Evaluation("distilled", "none right", Score(0, 5, 0.0, 0.0, 0.43), {"sums": Score(0, 5, 0.0, 0.0, 0.43)})
    drawn = draw_plots(
        replace(
            EMPTY,
            layout=("attention",),
            evaluations=(replace(TEACHER, overall=Score(0, 5, 0.0, 0.0, 0.43), tasks={}), nothing),
            models=(Model("teacher", "teacher", 0), Model("none right", "none right", 0)),
            rankings=(Ranking("flat", (0.0,), (0,), (0,), before=(0.0,)), Ranking("huge", (1e9,), (0,), ())),
        )
    )
    assert set(drawn) == {"accuracy", "frontier", "importance", "before_after", "layers"}
    read_png(plots.importance_chart([METHOD]))
    read_png(plots.layer_strips([METHOD, UNIFORM], narrow=True))


@pytest.mark.parametrize(
    ("scores", "floor"),
    [((1.0, 2.0, None), None), ((0.001, 1.0), 0.0005), ((0.0, 1.0), None), ((-1.0, 100.0), None)],
)
def test_importance_chart_is_logarithmic_only_where_bars_would_vanish(scores, floor):
    assert log_floor(scores) == floor


def test_slope_labels_are_the_ends_and_the_steepest():
    after = (0.5, 0.1, 0.2, 0.3, 0.4, 0.35)
    before = (0.6, 0.2, 0.3, 5.0, 0.5, 0.36)
    ranking = Ranking("MMR", after, (1, 2, 3, 5, 4, 0), (1, 2), before=before)
    assert extremes(ranking) == [1, 2, 4, 0, 3]
    gap = replace(ranking, before=(None, *before[1:]), scores=(*after[:5], None))
    assert [layer for layer, _, _ in gap.slopes] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.0, 10.0, 20.0], [0.0, 10.0, 20.0]),
        ([5.0, 5.0], [3.0, 7.0]),
        ([6.0, 5.0], [7.5, 3.5]),
        ([0.0, 1.0, 2.0, 50.0], [-3.0, 1.0, 5.0, 50.0]),
        ([], []),
    ],
)
def test_labels_are_spread_as_little_as_possible(places, expected):
    moved = spread(places, 4.0)
    assert moved == expected
    assert all(high - low >= 4.0 for low, high in pairwise(sorted(moved)))


def test_frontier_labels_do_not_cover_one_another(monkeypatch):
    """Three points in nearly one place: three labels apart, each inside the axes."""
    boxes, place = [], labels._box

    def recorded(*args):
        boxes.append(place(*args))
        return boxes[-1]

    monkeypatch.setattr(labels, "_box", recorded)
    points = tuple(FrontierPoint(Model(f"m{i}", f"model {i}"), 1 + i / 100, Measure(0.5)) for i in range(3))
    points += (FrontierPoint(Model("teacher", "teacher"), 2.0, Measure(0.9)),)
    plots.frontier_chart(Frontier("throughput", "x", points), "m0", 4)
    candidates = len(labels._DISTANCES) * len(labels._DIRECTIONS)
    placed = boxes[candidates :: candidates + 1]
    assert len(placed) == 4
    for i, box in enumerate(placed):
        assert labels.overlap(box, placed[i + 1 :]) == 0


def test_along_covers_a_line_without_gaps():
    boxes = along([(0.0, 0.0), (60.0, 0.0)], step=6.0)
    assert boxes[0][0] <= 0 <= 60 <= boxes[-1][2]
    assert all(after[0] <= before[2] for before, after in pairwise(boxes))


def test_overlap_is_the_area_in_common():
    assert labels.overlap((0, 0, 4, 2), [(1, 1, 10, 10), (4, 0, 5, 5), (3, -5, 9, 1)]) == 3 + 0 + 1
    assert labels.overlap((0, 0, 4, 2), []) == 0


@pytest.mark.parametrize(
    ("num_layers", "narrow", "step"), [(24, False, 1), (50, False, 2), (50, True, 5), (200, True, 20)]
)
def test_layer_ticks_leave_room(num_layers, narrow, step):
    ticks = layer_ticks(num_layers, narrow)
    assert ticks[:2] == [0, step]
    assert ticks[-1] < num_layers

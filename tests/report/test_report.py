"""The page says everything, loads nothing, survives gaps and hostile strings, and is repeatable."""

import io
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest
from report_example import example
from rich.console import Console

from hybridize.report import (
    CacheMemory,
    Evaluation,
    LossCurve,
    Ranking,
    ReportData,
    Score,
    StageCost,
    console_summary,
    headline,
    plots,
    render_page,
    write_report,
)
from hybridize.report.data import break_even_tokens
from hybridize.report.page import MAX_TABLE_POINTS, draw_plots
from hybridize.report.summary import duration, number, percent, short_bytes, short_count

TEACHER = Evaluation(
    "teacher", "teacher", Score(161, 200, 0.805, 0.744, 0.854), {"sums": Score(81, 90, 0.9, 0.821, 0.946)}
)
DISTILLED = Evaluation("distilled", "hybrid", Score(138, 200, 0.69, 0.623, 0.75), steps_correct=127)
RANDOM = Evaluation("random init: distilled", "random", Score(23, 200, 0.115, 0.078, 0.167), is_control=True)
METHOD = Ranking("MMR", (0.0713, 0.00291, None, -0.00417), order=(3, 1, 0), chosen=(3, 1))
UNIFORM = Ranking("uniform", (None,) * 4, order=(1, 3), chosen=(1, 3), is_control=True)

FULL = ReportData(
    title="A run",
    created="2026-03-14 15:09 UTC",
    teacher="tiny-teacher",
    layout=("attention", "mamba1", "attention", "mamba1"),
    recipe="stages:\n  - kind: distil\n",
    versions={"torch": "2.13.0", "hybridize": "0.1.0"},
    rankings=(METHOD, UNIFORM),
    losses=(
        LossCurve("distil", "hybrid", (7, 14, 21), (3.217, 0.4821, 0.0931), (57344, 114688, 172032)),
        LossCurve("scratch", "random", (8, 16), (9.473, 5.518), (65536, 131072), is_control=True),
    ),
    evaluations=(TEACHER, DISTILLED, RANDOM),
    memory=(CacheMemory("teacher", 12288, 0), CacheMemory("hybrid", 6144, 417792)),
    costs=(StageCost("distil", 431.6, 172032, 28311552), StageCost("evaluate", 52.4, status="skipped")),
)
EMPTY = ReportData(title="Nothing yet", created="today", teacher="t", layout=())


class Text(HTMLParser):
    """The page's text and the addresses it would load."""

    def __init__(self):
        super().__init__()
        self.words, self.sources, self.images, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")]
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        if self.lasttag != "style":
            self.words.append(data)


def read(page):
    parsed = Text()
    parsed.feed(page)
    parsed.text = plain(" ".join(parsed.words))
    return parsed


def plain(text):
    """The text with each run of spaces, whatever their kind, as one, and every dash a hyphen."""
    return re.sub(r"\s+", " ", text).replace("\N{EN DASH}", "-")


def decode_png(content):
    """(width, height) of a PNG whose chunks are all intact."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    stream, size, names = io.BytesIO(content[8:]), None, []
    while header := stream.read(8):
        length, name = struct.unpack(">I4s", header)
        body, (checksum,) = stream.read(length), struct.unpack(">I", stream.read(4))
        assert zlib.crc32(name + body) == checksum
        names.append(name)
        if name == b"IHDR":
            size = struct.unpack(">II", body[:8])
    assert names[-1] == b"IEND"
    assert b"tIME" not in names
    return size


@pytest.fixture(scope="module")
def full_page():
    return render_page(FULL)


def test_every_number_appears_on_the_page(full_page):
    text = read(full_page).text
    expected = [
        *("161 of 200", "80.5 %", "74.4-85.4 %", "81 of 90", "90.0 %", "82.1-94.6 %"),
        *("138 of 200", "69.0 %", "62.3-75.0 %", "127"),
        *("23 of 200", "11.5 %", "7.8-16.7 %"),
        *("0.0713", "0.00291", "-0.00417", "3, 1, 0", "1, 3", "nat/token"),
        *("7", "14", "21", "57 344", "114 688", "172 032", "3.217", "0.4821", "0.0931"),
        *("8", "16", "65 536", "131 072", "9.473", "5.518"),
        *("12 288", "6 144", "417 792", "68", "1.5 GiB"),
        *("431.6", "7 min 12 s", "28 311 552", "52.4", "484"),
        *("2 of 4", "2026-03-14 15:09 UTC", "2.13.0", "0.1.0", "tiny-teacher", "kind: distil", "skipped"),
    ]
    missing = [value for value in expected if not re.search(rf"(?<![\w.]){re.escape(value)}(?!\w)", text)]
    assert not missing


def test_headline_is_arithmetic_on_the_evaluations(full_page):
    sentence = (
        "The distilled hybrid keeps 85.7 % of the teacher's accuracy (138 of 200 right, the teacher 161 of "
        "200); the same budget from random initialisation: 14.3 %."
    )
    assert plain(headline(FULL)) == sentence
    assert sentence in read(full_page).text


def test_headline_says_only_what_was_run():
    without_control = replace(FULL, evaluations=(TEACHER, DISTILLED))
    assert headline(without_control).endswith("(138 of 200 right, the teacher 161 of 200).")
    for evaluations in ((), (TEACHER,), (DISTILLED, RANDOM), (TEACHER, RANDOM)):
        assert headline(replace(FULL, evaluations=evaluations)) is None
    hopeless = replace(TEACHER, overall=Score(0, 200, 0.0, 0.0, 0.019))
    data = replace(FULL, evaluations=(hopeless, DISTILLED))
    assert headline(data) is None
    assert "budget from random" not in read(render_page(data)).text


SECTIONS = {
    "rankings": "Which layers matter",
    "losses": "Training loss",
    "evaluations": "Accuracy, judged by generation",
    "memory": "Cache of one sequence",
    "costs": "What it took",
    "recipe": "Recipe",
    "versions": "Versions",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_missing_section_is_left_out_and_the_others_stay(section):
    text = read(render_page(replace(FULL, **{section: type(getattr(FULL, section))()}))).text
    assert {name for name, heading in SECTIONS.items() if heading not in text} == {section}


def test_a_report_on_nothing_is_still_a_page():
    page = read(render_page(EMPTY))
    assert "Nothing yet" in page.text
    assert not page.images
    assert not draw_plots(EMPTY)


def test_a_ranking_without_control_says_so(full_page):
    assert "No control was run" not in full_page
    assert "No control was run" in render_page(replace(FULL, rankings=(METHOD,)))


def test_controls_alone_are_drawn_as_strips_only():
    assert set(draw_plots(replace(EMPTY, layout=FULL.layout, rankings=(UNIFORM,)))) == {"layers"}


def test_hostile_strings_are_escaped():
    evil = "<script>alert('x')</script>\"><img src=http://example.org/x.png onerror=y>$\\frac{$ & {{ 7*7 }}"
    data = ReportData(
        title=evil,
        created=evil,
        teacher=evil,
        layout=(evil, "attention"),
        recipe=evil,
        versions={evil: evil},
        rankings=(Ranking(evil, (0.1, 0.2), (0, 1), (0,), unit=evil),),
        losses=(LossCurve(evil, evil, (1,), (2.0,), (3,)),),
        evaluations=(
            replace(TEACHER, label=evil, tasks={evil: TEACHER.overall}),
            replace(DISTILLED, label=evil),
        ),
        memory=(CacheMemory(evil, 10, 0), CacheMemory(evil, 5, 10)),
        costs=(StageCost(evil, 1.0, status=evil),),
    )
    page = read(render_page(data))
    assert "script" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not any(name.startswith("on") for image in page.images for name in image)
    assert page.text.count(plain(evil)) >= 12


def test_the_page_loads_nothing_from_anywhere(full_page):
    page = read(full_page)
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", full_page)
    assert "default-src 'none'" in full_page


def test_every_image_says_what_it_shows(full_page):
    images = read(full_page).images
    assert len(images) == 5
    assert all(len(image["alt"]) > 40 for image in images)
    assert any("MMR would replace layers 1, 3" in image["alt"] for image in images)


def test_report_is_written_whole_and_repeatable(tmp_path):
    first, second = tmp_path / "a" / "deep", tmp_path / "b"
    page = write_report(first, FULL)
    assert page == first / "report.html"
    write_report(second, FULL)
    names = {path.name for path in first.iterdir()}
    assert names == {"report.html", "accuracy.png", "importance.png", "layers.png", "loss.png", "memory.png"}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for path in first.glob("*.png"):
        width, height = decode_png(path.read_bytes())
        assert width == plots.WIDTH_INCHES * plots.DPI
        assert 150 < height < 1000

    write_report(first, replace(FULL, rankings=()))
    assert {path.name for path in first.iterdir()} == names - {"importance.png", "layers.png"}


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    page = write_report(tmp_path, EMPTY)
    before = page.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, replace(EMPTY, title="New"))
    assert page.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_plots_ignore_and_keep_the_users_matplotlib_settings():
    expected = plots.memory_chart(FULL.memory)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
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


def test_memory_chart_marks_a_crossing_within_or_before_its_axis():
    baseline = CacheMemory("teacher", 1000, 0)
    for other in (
        CacheMemory("early", 500, 5_000),
        CacheMemory("late", 500, 5_000_000),
        CacheMemory("never", 1000, 1),
        CacheMemory("beyond", 999, 10**9),
    ):
        decode_png(plots.memory_chart((baseline, other)))


def test_a_run_of_usual_size_is_drawn_without_a_warning():
    page = read(render_page(example()))
    assert len(page.images) == 5
    assert "keeps 85.7 %" in page.text


@pytest.mark.parametrize(
    ("kv", "state", "expected"),
    [(6144, 417792, 68.0), (12288, 10, None), (20000, 10, None), (6144, 0, None)],
)
def test_break_even_is_where_the_two_lines_cross(kv, state, expected):
    baseline, other = CacheMemory("teacher", 12288, 0), CacheMemory("hybrid", kv, state)
    tokens = break_even_tokens(baseline, other)
    assert tokens == expected
    if tokens is not None:
        assert baseline.bytes_at(tokens) == other.bytes_at(tokens)


def test_long_curves_are_thinned_in_the_table_with_both_ends():
    count = 1001
    steps = tuple(range(1, count + 1))
    curve = LossCurve("long", "long", steps, tuple(1 / step for step in steps), tuple(8 * step for step in steps))
    text = read(render_page(replace(EMPTY, losses=(curve,)))).text
    assert f"{MAX_TABLE_POINTS} of 1 001 points" in text
    assert "1 8 1 " in text
    assert "1 001 8 008 0.000999" in text


def test_console_summary_shows_models_and_controls():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(console_summary(FULL))
    text = plain(console.export_text())
    assert "teacher 161 of 200 80.5 % 74.4-85.4 % 100.0 %" in text
    assert "hybrid 138 of 200 69.0 % 62.3-75.0 % 85.7 %" in text
    assert "random (control) 23 of 200 11.5 % 7.8-16.7 % 14.3 %" in text
    assert "keeps 85.7 %" in text


def test_console_summary_prints_markup_as_it_is():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(console_summary(replace(EMPTY, title="[red]x", evaluations=(replace(RANDOM, label="[b]y"),))))
    text = console.export_text()
    assert "[red]x" in text
    assert "[b]y (control)" in text


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (number, None, "-"),
        (number, 1234567, "1 234 567"),
        (number, 0.000123456, "0.0001235"),
        (percent, 0.8571, "85.7 %"),
        (short_count, 131072, "131k"),
        (short_count, 2.5e9, "2.5G"),
        (short_count, 12, "12"),
        (short_bytes, 1048576, "1 MiB"),
        (short_bytes, 512, "512 B"),
        (duration, 3.25, "3.2 s"),
        (duration, 125.4, "2 min 5 s"),
        (duration, 4210, "1 h 10 min"),
    ],
)
def test_numbers_are_written_for_reading(write, value, expected):
    assert plain(write(value)) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ranking("m", (0.1,), (0, 0), ()), "order names a layer twice"),
        (lambda: Ranking("m", (0.1,), (0,), (3,)), r"chosen names layers \[3\]; .* 0..0"),
        (lambda: LossCurve("c", "c", (1, 2), (0.5,), (8, 16)), "2 steps, 1 losses and 2 token counts"),
        (lambda: replace(EMPTY, rankings=(METHOD,)), "4 scores for 0 layers"),
    ],
)
def test_data_that_disagree_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("scores", "floor"),
    [((1.0, 2.0, None), None), ((0.001, 1.0), 0.0005), ((0.0, 1.0), None), ((-1.0, 100.0), None)],
)
def test_importance_chart_is_logarithmic_only_where_bars_would_vanish(scores, floor):
    from hybridize.report.plots import _log_floor

    assert _log_floor(scores) == floor

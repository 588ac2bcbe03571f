"""The page says everything, loads nothing, survives gaps and hostile strings, and is repeatable."""

import re
from dataclasses import replace

import pytest
from reading import Page, plain, read_png
from report_example import example
from report_small import DISTILLED, EMPTY, FULL, METHOD, TEACHER, UNIFORM

from hybridize.report import (
    CacheMemory,
    HarnessScore,
    LossCurve,
    Merge,
    Model,
    Ranking,
    ReportData,
    Serving,
    StageCost,
    TextScore,
    Throughput,
    TokenSpend,
    Traces,
    headline,
    render_page,
    write_report,
)
from hybridize.report.data import break_even_tokens
from hybridize.report.figures import draw_plots
from hybridize.report.page import MAX_TABLE_POINTS

SECTIONS = {
    "rankings": "Which layers matter",
    "losses": "Training loss",
    "evaluations": "Accuracy, judged by generation: level 2",
    "memory": "Cache of one sequence",
    "costs": "What it took",
    "throughput": "Throughput",
    "harness": "Harness tasks",
    "texts": "Plain text: perplexity and distance from the teacher",
    "traces": "Traces made for training",
    "merges": "Merged models",
}


def test_every_number_of_a_small_run_appears_on_the_page(undrawn):
    text = Page(render_page(FULL)).text
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


def test_speed_in_a_server_says_which_and_where(undrawn):
    serving = Serving("0.26.0", "NVIDIA H200", "1 to 16k tokens", "as many sequences as the memory holds")
    speeds = [
        Throughput(name, rate, 0.99 * rate, 1.01 * rate, sequences, 1, 16384, 3, serving, layout_of)
        for name, rate, sequences, layout_of in (
            ("teacher", 1000.0, 30, ""),
            ("h-12-distill", 3000.0, 74, ""),
            ("merged", 3000.0, 74, "h-12-distill"),
        )
    ]
    whole = example()
    data = replace(whole, throughput=(*whole.throughput, *speeds), throughput_notes=("serving.jsonl, line 3: torn",))
    shown = Page(render_page(data))
    (frontier,) = [caption for caption in shown.captions if "Up and to the right" in caption]
    assert "vLLM 0.26.0 on NVIDIA H200, 1 to 16k tokens, as many sequences as the memory holds." in plain(frontier)
    assert shown.row("Tokens/s in vLLM", "12 of 24")[4:6] == ["3.00 x", "3 000"]
    (table,) = [table for table in shown.tables if "Slowest–fastest" in table[0]]  # noqa: RUF001
    rows = [[plain(cell).strip() for cell in row] for row in table]
    start = rows.index(["vLLM 0.26.0 on NVIDIA H200, 1 to 16k tokens, as many sequences as the memory holds"])
    assert [row[0] for row in rows[start + 1 :]] == ["teacher", "12 of 24, and 1 more with its layout"]
    assert rows[start + 2][1:] == ["74", "1", "16 384", "3 000", "2 970-3 030", "3", "3.00 x"]
    assert ["transformers, batch of 32, 16 prompt and 1,024 new tokens"] in rows
    assert "serving.jsonl, line 3: torn" in shown.text
    noted = Page(render_page(replace(EMPTY, throughput_notes=("serving.jsonl, line 3: torn",))))
    assert "serving.jsonl, line 3: torn" in noted.text


def test_the_first_screen_says_the_result_with_its_figures(page):
    sentence = headline(example())
    before_sections = page.text.split("The hybrid, layer by layer")[0]
    assert plain(sentence) in before_sections
    for figure in ("84.0 %", "79.0 %", "94.0 % of the teacher's", "12 of 24", "1.82 x", "48 KiB", "12M 4 stages"):
        assert figure in before_sections


@pytest.mark.parametrize(
    ("column", "name", "cells"),
    [
        ("Tokens so far", "16 of 24", ["16 of 24", "56.0 %", "66.7 %", "2.25 x", "2 790", "20 152 320"]),
        ("Tokens so far", "teacher", ["0 of 24", "84.0 %", "100.0 %", "1.00 x", "1 240", "-"]),
        ("pass@4", "12 of 24, SFT and merged", ["316 of 400", "79.0 %", "290", "79.0 %", "88.5 %"]),
        ("pass@4", "6 of 24", ["325 of 400", "301", "-"]),
        ("Slowest-fastest", "6 of 24", ["32", "16", "1 024", "1 612", "1 548-1 660", "3", "1.30 x"]),
        ("Perplexity", "12 of 24, SFT and merged", ["wikitext-2 (test)", "100 000", "2.603", "13.5", "0.142"]),
        ("Standard error", "gsm8k", ["exact_match, flexible-extract", "teacher", "81.2 %", "2.5 %", "250"]),
        ("Standard error", "wikitext", ["word_perplexity", "12.06", "-"]),
        ("Found right, kept", "traces", ["teacher", "1 000", "4", "4 000", "3 127", "78.2 %", "2 216 448", "world"]),
        ("Sources and weights", "12 of 24, SFT and merged", ["slerp", "12 of 24: 0.3, sft: 0.7"]),
        ("First loss", "fit of 6 layers", ["fit", "300", "4 915 200", "0.9647", "of the output's variance"]),
        ("Trained parameters", "h-6-distill", ["1 h 26 min", "5 210", "4 915 200", "596 049 920", "done"]),
    ],
)
def test_a_row_says_what_was_measured(page, column, name, cells):
    row = page.row(column, name)
    assert not [cell for cell in cells if cell not in row]


def test_numbers_stand_at_the_right(drawn):
    html = render_page(example(), drawn)
    cells = re.findall(r"<td([^>]*)>([^<]*)</td>", html)
    number = r"\s*[\d\s]*\d(\.\d+)?(\s*[%\N{MULTIPLICATION SIGN}])?\s*"
    numbers = [(attributes, cell) for attributes, cell in cells if re.fullmatch(number, cell)]
    assert len(numbers) > 300
    assert all('class="n' in attributes for attributes, _ in numbers)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_missing_section_is_left_out_and_the_others_stay(section, undrawn):
    headings = Page(render_page(replace(example(), **{section: ()}))).headings
    assert {name for name, heading in SECTIONS.items() if heading not in headings} == {section}


@pytest.mark.parametrize(
    ("field", "headings", "plots"),
    [
        (
            "rankings",
            [
                "Which layers matter",
                "Importance of each layer",
                "Loss with a mixer in a layer's place, before and after training it",
                "What each ranking replaces",
            ],
            {"importance", "before_after", "layers"},
        ),
        ("evaluations", ["Accuracy, judged by generation: level 2", "By task"], {"accuracy", "tasks"}),
        ("harness", ["Harness tasks", "By task"], {"accuracy", "tasks"}),
        ("throughput", ["Throughput"], {"throughput"}),
        ("texts", ["Plain text: perplexity and distance from the teacher"], set()),
        ("models", ["Models"], set()),
        ("losses", ["Training loss"], {"loss"}),
    ],
)
def test_a_report_of_one_thing_has_that_alone(field, headings, plots, undrawn):
    whole = example()
    data = replace(EMPTY, layout=("attention",) * 24, **{field: getattr(whole, field)})
    page = Page(render_page(data))
    assert page.headings == headings
    assert set(draw_plots(data)) == plots
    assert len(page.images) == len(plots)


def test_a_report_on_nothing_is_still_a_page():
    page = Page(render_page(EMPTY))
    assert "Nothing yet" in page.text
    assert not page.images
    assert not page.headings
    assert not draw_plots(EMPTY)


def test_harness_metrics_that_are_no_shares_are_told_without_a_chart(undrawn):
    data = replace(EMPTY, harness=(HarnessScore("teacher", "wikitext", "word_perplexity", 12.06, is_share=False),))
    page = Page(render_page(data))
    assert page.headings == ["Harness tasks"]
    assert "12.06" in page.row("Standard error", "wikitext")
    assert not page.images


def test_recipe_and_versions_are_left_out_where_there_are_none(undrawn):
    headings = Page(render_page(replace(FULL, recipe="", versions={}))).headings
    assert "How to run it again" not in headings
    assert "How to run it again" in Page(render_page(replace(FULL, versions={}))).headings


def test_a_ranking_without_control_says_so(undrawn):
    assert "No control was run" not in render_page(FULL)
    assert "No control was run" in render_page(replace(FULL, rankings=(METHOD,)))


def test_stale_stages_are_named_before_the_result(undrawn):
    assert "Stale" not in render_page(FULL)
    html = render_page(replace(FULL, stale={"distil": "its data changed", "b": "made from <distil>"}))
    text = Page(html).text
    assert "Stale: distil (its data changed), b (made from <distil>). These stages are shown as last made" in text
    assert html.index("Stale: ") < html.index('class="headline"')
    assert "This stage is shown as last made; the next run makes it anew." in render_page(
        replace(FULL, stale={"a": "x"})
    )


def test_a_frontier_without_throughput_says_so(undrawn, page):
    assert "No throughput was measured" not in page.text
    text = Page(render_page(replace(example(), throughput=()))).text
    assert "No throughput was measured in this run; the number of mixer layers stands in for it" in text


def test_controls_alone_are_drawn_as_strips_only(undrawn):
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
        rankings=(Ranking(evil, (0.1, 0.2), (0, 1), (0,), unit=evil, before=(0.3, 0.4), stage=evil, paper=evil),),
        losses=(LossCurve(evil, evil, (1,), (2.0,), (3,), unit=evil, kind=evil),),
        evaluations=(
            replace(TEACHER, label=evil, tasks={evil: TEACHER.overall}, suite=evil),
            replace(DISTILLED, label=evil, suite=evil),
        ),
        memory=(CacheMemory(evil, 10, 0), CacheMemory(evil, 5, 10)),
        costs=(StageCost(evil, 1.0, status=evil),),
        models=(Model(evil, evil, 1, (TokenSpend(evil, 5),)),),
        throughput=(Throughput(evil, 1.0, 1.0, 1.0, 1, 1, 1, 1), Throughput("teacher", 1.0, 1.0, 1.0, 1, 1, 1, 1)),
        harness=(HarnessScore(evil, evil, evil, 0.5),),
        texts=(TextScore(evil, evil, 1, 1.0, 2.7),),
        traces=(Traces(evil, evil, 1, 1, 1, 1, 1, evil),),
        merges=(Merge(evil, evil, (evil,), (1.0,), evil),),
    )
    page = Page(render_page(data))
    assert "script" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not any(name.startswith("on") for image in page.images for name in image)
    assert page.text.count(plain(evil)) >= 30


def test_the_page_loads_nothing_from_anywhere(page, drawn):
    html = render_page(example(), drawn)
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", html)
    assert "default-src 'none'" in html


def test_wide_tables_scroll_in_their_container_and_pictures_have_a_narrow_twin(drawn):
    html = render_page(example(), drawn)
    assert html.count("<table>") == html.count('<div class="table"><table>') > 10
    assert html.count("<picture>") == html.count("<source media=") == html.count("<img ") == len(drawn)
    assert ".table { overflow-x: auto;" in html


def test_report_is_written_whole_and_small(tmp_path, drawn, monkeypatch):
    folder = tmp_path / "a" / "deep"
    monkeypatch.setattr("hybridize.report.page.draw_plots", lambda _: drawn)
    page = write_report(folder, example())
    assert page == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == {"report.html", *(f"{name}.png" for name in drawn)}
    assert all((folder / f"{name}.png").read_bytes() == plot.png for name, plot in drawn.items())
    assert page.read_text("utf-8") == render_page(example(), drawn)
    assert 100_000 < sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000

    monkeypatch.setattr("hybridize.report.page.draw_plots", lambda _: {"layers": drawn["layers"]})
    (folder / "mine.png").write_bytes(b"not of the report")
    write_report(folder, replace(FULL, evaluations=(), losses=(), memory=(), rankings=(UNIFORM,)))
    assert {path.name for path in folder.iterdir()} == {"report.html", "layers.png", "mine.png"}


def test_the_same_data_give_the_same_bytes(tmp_path):
    data = replace(FULL, evaluations=(), memory=(), losses=())
    first, second = (write_report(tmp_path / name, data).parent for name in "ab")
    names = {path.name for path in first.iterdir()}
    assert names == {"report.html", "importance.png", "layers.png"}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    page = write_report(tmp_path, EMPTY)
    before = page.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    monkeypatch.setattr("pathlib.Path.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, replace(EMPTY, title="New"))
    assert page.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_long_curves_are_thinned_in_the_table_with_both_ends(undrawn):
    count = 1001
    steps = tuple(range(1, count + 1))
    curve = LossCurve("long", "long", steps, tuple(1 / step for step in steps), tuple(8 * step for step in steps))
    text = Page(render_page(replace(EMPTY, losses=(curve,)))).text
    assert f"{MAX_TABLE_POINTS} of 1 001 points" in text
    assert "1 8 1 " in text
    assert "1 001 8 008 0.000999" in text


def test_pictures_on_the_page_are_those_beside_it(page, drawn):
    sources = {image["src"] for image in page.images}
    assert sources == {plot.source for plot in drawn.values()}
    for plot in drawn.values():
        assert read_png(plot.png).width > read_png(plot.narrow_png).width


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ranking("m", (0.1,), (0, 0), ()), "order names a layer twice"),
        (lambda: Ranking("m", (0.1,), (0,), (3,)), r"chosen names layers \[3\]; .* 0..0"),
        (lambda: Ranking("m", (0.1,), (0,), (), before=(1.0, 2.0)), "2 values before training for 1 scores"),
        (lambda: LossCurve("c", "c", (1, 2), (0.5,), (8, 16)), "2 steps, 1 losses and 2 token counts"),
        (lambda: replace(EMPTY, rankings=(METHOD,)), "4 scores for 0 layers"),
        (lambda: replace(EMPTY, models=(Model("a", "a"), Model("a", "b"))), "a name stands twice"),
        (lambda: Model("m", "m", 1, (TokenSpend("s", 1), TokenSpend("s", 1))), "count a stage twice"),
        (lambda: Throughput("m", 5.0, 6.0, 7.0, 1, 1, 1, 3), "5.0 tokens/s is not within its repeats, 6.0..7.0"),
        (lambda: Merge("m", "linear", ("a", "b"), (1.0,)), "1 weights for 2 sources"),
    ],
)
def test_data_that_disagree_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""The sentence and the console's table say what was measured, and no more; quality is joined with speed rightly."""

import io
from dataclasses import replace

import pytest
from reading import plain
from report_example import example
from report_small import DISTILLED, EMPTY, FULL, METHOD, RANDOM, TEACHER
from rich.console import Console

from hybridize.report import (
    CacheMemory,
    HarnessScore,
    Model,
    Ranking,
    Score,
    Serving,
    TextScore,
    Throughput,
    TokenSpend,
    Traces,
    console_summary,
    headline,
)
from hybridize.report.numbers import (
    duration,
    listing,
    number,
    percent,
    short_bytes,
    short_count,
    times,
    token_count,
)
from hybridize.report.study import (
    Frontier,
    FrontierPoint,
    Measure,
    frontier,
    main_setting,
    main_suite,
    settings,
    suites,
)
from hybridize.report.summary import key_figures, result_model


def sentence(data):
    return plain(headline(data))


def speed(model, rate, new_tokens=1024):
    return Throughput(model, rate, rate, rate, 32, 16, new_tokens, 3)


def test_headline_is_arithmetic_on_the_evaluations():
    assert sentence(FULL) == (
        "The distilled hybrid keeps 85.7 % of the teacher's accuracy (138 of 200 right, the teacher 161 of "
        "200); from random initialisation: 14.3 %."
    )


def test_headline_tells_mixers_speed_and_tokens_where_they_are_known():
    assert sentence(example()) == (
        "With 12 of 24 layers as mixers, the hybrid “12 of 24, SFT and merged” keeps 94.0 % of the teacher's "
        "accuracy (316 of 400 right, the teacher 336 of 400) and generates 1.82 x as many tokens per second, after "
        "training on 12M tokens."
    )


@pytest.mark.parametrize(
    ("spent", "clause"),
    [
        (5000, "; from random initialisation on as many tokens: 14.3 %."),
        (7000, "; from random initialisation on 7k tokens: 14.3 %."),
    ],
)
def test_headline_claims_an_equal_budget_only_where_it_is_equal(spent, clause):
    models = (
        Model("hybrid", "hybrid", 2, (TokenSpend("a", 5000),)),
        Model("random", "random", 2, (TokenSpend("b", spent),), is_control=True),
    )
    assert sentence(replace(FULL, models=models)).endswith(f"after training on 5k tokens{clause}")


def test_headline_says_only_what_was_run():
    bare = replace(FULL, rankings=())
    without_control = replace(bare, evaluations=(TEACHER, DISTILLED))
    assert headline(without_control).endswith("(138 of 200 right, the teacher 161 of 200).")
    for evaluations in ((), (TEACHER,), (DISTILLED, RANDOM), (TEACHER, RANDOM)):
        assert headline(replace(bare, evaluations=evaluations)) is None
    hopeless = replace(TEACHER, overall=Score(0, 200, 0.0, 0.0, 0.019))
    assert headline(replace(bare, evaluations=(hopeless, DISTILLED))) is None


def test_headline_falls_back_to_speed_text_and_ranking():
    bare = replace(EMPTY, layout=("attention",) * 4)
    fast = replace(bare, throughput=(speed("hybrid", 300.0),))
    assert sentence(fast) == "The hybrid “hybrid” generates 300 tokens per second."
    both = replace(bare, throughput=(speed("teacher", 200.0), speed("hybrid", 300.0)))
    assert sentence(both) == "The hybrid “hybrid” generates 1.50 x as many tokens per second."
    texts = (TextScore("teacher", "news", 10, 2.0, 7.4), TextScore("hybrid", "news", 10, 2.1, 8.2, 0.1))
    told = "The hybrid “hybrid” has a perplexity of 8.2 on news (the teacher 7.4)."
    assert sentence(replace(bare, texts=texts)) == told
    ranked = replace(bare, rankings=(METHOD,))
    assert sentence(ranked) == ("MMR ranks 3 layers: 3 matters least (-0.00417 nat/token), 0 most (0.0713 nat/token).")


def test_the_page_is_about_the_last_model_judged_that_is_no_control():
    untrained = replace(DISTILLED, point="converted", label="untrained")
    sft = replace(DISTILLED, point="SFT", label="sft")
    data = replace(FULL, evaluations=(TEACHER, DISTILLED, sft, untrained, RANDOM))
    assert result_model(data).name == "sft"
    assert result_model(replace(data, result="hybrid")).name == "hybrid"
    assert result_model(replace(data, evaluations=(TEACHER, untrained))).name == "untrained"
    assert sentence(replace(data, evaluations=(TEACHER, untrained))).startswith("The hybrid as converted, untrained, ")
    assert result_model(EMPTY) is None
    two = replace(FULL, evaluations=(TEACHER, DISTILLED, replace(DISTILLED, label="larger")))
    assert sentence(two).startswith("The distilled hybrid “larger” keeps")


def test_key_figures_stand_only_for_what_was_measured():
    names = [figure.name for figure in key_figures(example())]
    assert names == [
        "Teacher's accuracy",
        "Hybrid's accuracy",
        "Mixer layers",
        "Throughput",
        "Cache per token",
        "Tokens trained on",
    ]
    assert [figure.name for figure in key_figures(replace(FULL, memory=()))] == names[:2]
    assert not key_figures(EMPTY)


def console_text(data, width=110):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(console_summary(data))
    return plain(console.export_text())


def test_console_summary_shows_models_and_controls():
    text = console_text(FULL)
    assert "teacher 161 of 200 80.5 % 74.4-85.4 % 100.0 %" in text
    assert "hybrid 138 of 200 69.0 % 62.3-75.0 % 85.7 %" in text
    assert "random (control) 23 of 200 11.5 % 7.8-16.7 % 14.3 %" in text
    assert "keeps 85.7 %" in text
    assert "Speed" not in text
    assert "Tokens" not in text


def test_console_summary_shows_speed_and_tokens_where_they_are_known():
    text = console_text(example(), width=140)
    assert "16 of 24, level 2 224 of 400 56.0 % 51.1-60.8 % 66.7 % 2.25 x 20.2M" in text
    assert "6 of 24, untrained, level 2 15 of 400 3.8 % 2.3-6.1 % 4.5 % - -" in text


def test_console_summary_prints_markup_as_it_is():
    text = console_text(replace(EMPTY, title="[red]x", evaluations=(replace(RANDOM, label="[b]y"),)))
    assert "[red]x" in text
    assert "[b]y (control)" in text


def test_speed_is_relative_to_the_teacher_in_the_same_setting_only():
    data = replace(
        EMPTY,
        throughput=(
            speed("teacher", 100.0),
            speed("a", 150.0),
            speed("a", 900.0, new_tokens=16),
            speed("a", 160.0),
        ),
    )
    first, second = settings(data)
    assert first.is_relative
    assert first.of("a").value == 1.6  # the later of two measurements
    assert not second.is_relative
    assert second.of("a").value == 900.0
    assert second.of("teacher") is None
    assert main_setting(data) == first


SERVING = Serving("0.26.0", "NVIDIA H200", "1 to 16k tokens", "as many sequences as the memory holds")


def served(model, rate, sequences=30, serving=SERVING, layout_of=""):
    return Throughput(model, rate, 0.99 * rate, 1.01 * rate, sequences, 1, 16384, 3, serving, layout_of)


def test_speed_in_a_server_is_the_frontiers_whatever_else_was_measured():
    whole = example()
    in_vllm = (served("teacher", 1000.0), served("h-12-distill", 3000.0, 74), served("h-16-distill", 4500.0, 120))
    data = replace(whole, throughput=(*whole.throughput, *in_vllm))
    setting = main_setting(data)
    assert len(setting.speeds) < max(len(other.speeds) for other in settings(data))
    assert plain(str(setting)) == ("vLLM 0.26.0 on NVIDIA H200, 1 to 16k tokens, as many sequences as the memory holds")
    place = frontier(data)
    assert {point.model.name: point.x for point in place.points} == {
        "teacher": 1.0,
        "h-12-distill": 3.0,
        "h-16-distill": 4.5,
    }
    assert plain(place.label) == "throughput in vLLM, x the teacher's; 1 to 16k tokens, NVIDIA H200"
    told = sentence(replace(data, result="h-12-distill"))
    assert "generates 3.00 x as many tokens per second in vLLM (1 to 16k tokens, NVIDIA H200)" in told
    assert "Speed in vLLM" in console_text(data, width=150)
    alone = replace(whole, throughput=(*whole.throughput, served("teacher", 1000.0)))
    assert main_setting(alone) == main_setting(whole), "a teacher by itself compares nothing"
    assert frontier(alone) == frontier(whole)


def test_servers_that_differ_in_anything_are_not_compared():
    others = [
        replace(SERVING, device="NVIDIA H100"),
        replace(SERVING, version="0.32.0"),
        replace(SERVING, options=("states in bfloat16",)),
        replace(SERVING, scenario="1k to 16k tokens"),
    ]
    speeds = (served("teacher", 100.0), *(served("a", 200.0, serving=other) for other in others))
    found = settings(replace(EMPTY, throughput=speeds))
    assert [setting.is_relative for setting in found] == [True, False, False, False, False]
    assert plain(found[1].unit) == "throughput in vLLM, tokens per second"


def test_models_that_stand_for_a_layout_are_counted_with_those_that_have_it():
    speeds = (
        served("teacher", 100.0),
        served("a", 200.0),
        served("b", 200.0, layout_of="a"),
        served("c", 200.0, layout_of="a"),
    )
    (setting,) = settings(replace(EMPTY, throughput=speeds))
    assert setting.measured == {"teacher": 0, "a": 2}
    assert setting.of("c").value == 2.0


def test_suites_keep_different_questions_apart():
    harder = replace(TEACHER, suite="level 5", overall=Score(1, 4, 0.25, 0.05, 0.7))
    data = replace(FULL, evaluations=(harder, TEACHER, DISTILLED))
    assert [(suite.name, len(suite.rows)) for suite in suites(data)] == [("level 5", 1), ("", 2)]
    assert main_suite(data).name == ""  # the first suite has nothing to compare
    assert main_suite(data).of("hybrid").value == 0.69


def test_harness_mean_is_over_all_tasks_or_not_given():
    data = replace(
        EMPTY,
        harness=(
            HarnessScore("teacher", "a", "strict", 0.8, 0.03),
            HarnessScore("teacher", "a", "flexible", 0.9, 0.03),
            HarnessScore("teacher", "b", "acc", 0.4, 0.04),
            HarnessScore("hybrid", "a", "strict", 0.7, 0.03),
            HarnessScore("other", "a", "strict", 0.7, None),
            HarnessScore("other", "b", "acc", 0.3, 0.04),
        ),
    )
    (suite,) = suites(data)
    assert suite.teacher.value == pytest.approx(0.6)  # a task's first metric counts
    assert suite.teacher.high - 0.6 == pytest.approx(1.96 * 0.05 / 2, rel=1e-3)
    assert suite.of("hybrid") is None
    assert suite.of("other") == Measure(0.5)  # without all standard errors there is no interval


def test_frontier_takes_throughput_then_mixers_then_cache():
    whole = example()
    place = frontier(whole)
    assert place.axis == "throughput"
    assert place.note == ""
    assert {point.model.name: round(point.x, 2) for point in place.points}["h-16-distill"] == 2.25
    mixers = frontier(replace(whole, throughput=()))
    assert mixers.axis == "mixers"
    assert {point.model.name: point.x for point in mixers.points}["h-16-distill"] == 16
    assert "number of mixer layers" in mixers.note
    cache = frontier(FULL)
    assert [(point.model.name, point.x) for point in cache.points] == [("teacher", 12288), ("hybrid", 6144)]
    assert cache.axis == "cache"
    assert frontier(replace(FULL, memory=())) is None
    assert frontier(replace(whole, evaluations=(), harness=())) is None
    alone = replace(whole, throughput=(speed("teacher", 1.0),), models=(), memory=())
    assert frontier(alone) is None  # one point is no frontier


def test_frontier_line_joins_what_no_other_model_beats():
    def point(name, x, quality, is_control=False):
        return FrontierPoint(Model(name, name, is_control=is_control), x, Measure(quality))

    points = (
        point("fast", 3, 0.5),
        point("teacher", 1, 0.9),
        point("beaten", 1.5, 0.6),
        point("good", 2, 0.7),
        point("control", 9, 0.99, is_control=True),
    )
    assert [p.model.name for p in Frontier("throughput", "", points).best] == ["teacher", "good", "fast"]
    assert [p.model.name for p in Frontier("cache", "", points).best] == ["teacher"]


def test_a_model_that_is_not_listed_goes_by_its_evaluation_or_its_name():
    assert FULL.model("random") == Model("random", "random", is_control=True)
    assert replace(FULL, evaluations=(replace(DISTILLED, model="stage-3"),)).model("stage-3").label == "hybrid"
    assert EMPTY.model("nobody").label == "nobody"
    assert CacheMemory("hybrid", 1, 0).key == "hybrid"
    assert CacheMemory("12 of 24", 1, 0, "distill").key == "distill"
    assert TEACHER.key == "teacher"
    assert Model("a", "a").cumulative_tokens is None
    assert Traces("t", "m", 0, 1, 0, 0, 0).verified_share is None
    assert not Ranking("uniform", (None,), (), ()).is_scored


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (number, None, "-"),
        (number, 1234567, "1 234 567"),
        (number, 12345.6, "12 346"),
        (number, 999.96, "1 000"),
        (number, 0.000123456, "0.0001235"),
        (percent, 0.8571, "85.7 %"),
        (percent, None, "-"),
        (times, 1.8172, "1.82 x"),
        (times, None, "-"),
        (short_count, 131072, "131k"),
        (short_count, 2.5e9, "2.5G"),
        (short_count, 999_999, "1M"),
        (short_count, 12, "12"),
        (token_count, 55_900_000_000, "55.9B tokens"),
        (short_bytes, 1048576, "1 MiB"),
        (short_bytes, 1023 * 1024, "1023 KiB"),
        (short_bytes, 512, "512 B"),
        (duration, 3.25, "3.2 s"),
        (duration, 125.4, "2 min 5 s"),
        (duration, 4210, "1 h 10 min"),
        (listing, (8, 1), "layers 1, 8"),
        (listing, (3,), "layer 3"),
        (listing, (), "no layer"),
    ],
)
def test_numbers_are_written_for_reading(write, value, expected):
    assert plain(write(value)) == expected

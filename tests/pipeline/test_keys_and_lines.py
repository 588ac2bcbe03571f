"""Old results stand though stages have got new fields, and a line may hold whatever a file or an error says."""

import io

import pytest
from rich.console import Console

from hybridize.pipeline.parallel import _Board, threads_of_each
from hybridize.pipeline.progress import Reporter
from hybridize.pipeline.stages import spec_for_key
from hybridize.spec.recipe import parse_recipe
from hybridize.spec.stages import ConvertStage, EvaluateStage


def test_new_fields_are_no_part_of_the_key_of_a_stage_without_them():
    convert = spec_for_key(ConvertStage(name="c", layers=(1,)))
    assert "search" not in convert
    assert set(convert) == {
        "kind", "mixer", "init", "model", "layers", "ranking", "num_layers", "layout", "blocks", "seed"
    }  # fmt: skip
    assert "levels" not in spec_for_key(EvaluateStage(name="e", model="teacher"))
    assert spec_for_key(ConvertStage(name="c", search="s"))["search"] == "s"


def test_a_message_with_brackets_is_printed_as_it_is():
    said = io.StringIO()
    board = _Board(Reporter(Console(file=said, width=200)))
    board.say("left", "failed: the template has no [/INST] behind [bold]")
    board.begin("left", "1/2", "judge [/x]")
    assert "failed: the template has no [/INST] behind [bold]" in said.getvalue()
    assert "1/2 left  judge [/x]" in said.getvalue()


def test_threads_are_counted_where_the_system_knows_no_affinity(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert threads_of_each(5) == 2


def test_a_layout_is_converted_with_the_init_that_it_was_searched_for():
    stages = [
        {"name": "r", "kind": "rank", "init": "neutral"},
        {"name": "s", "kind": "search", "rankings": ["r"], "num_layers": 1},
        {"name": "c", "kind": "convert", "search": "s", "init": "neutral"},
    ]
    recipe = {"name": "x", "teacher": "./t", "stages": stages}
    again = parse_recipe(recipe).model_dump(mode="json")
    assert parse_recipe(again).stages[2].search == "s", "what was written down whole is read again"
    stages[2]["init"] = "aligned"
    with pytest.raises(ValueError, match=r"stages\[2\]\.init: it is aligned, but s goes by r, which ranks"):
        parse_recipe(recipe)


def test_a_mixer_beside_a_layout_is_refused_even_if_it_is_the_default():
    with pytest.raises(ValueError, match="mixer: the layout says what every layer becomes; remove mixer"):
        ConvertStage(name="c", layout="am", mixer="mamba1")

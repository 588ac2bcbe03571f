"""Scenarios and layouts as they are written on the command line."""

import pytest

from hybridize.bench.scenarios import PAPER_LAYOUTS, SHAPES, Scenario, read_layouts, read_scenarios


def test_scenarios_are_read_with_and_without_thousands():
    assert read_scenarios(["1:16k", "1024:8192"]) == (Scenario(1, 16384), Scenario(1024, 8192))
    assert str(Scenario(1, 16384)) == "1 -> 16k"
    assert Scenario(1024, 8192).tokens == 9216


@pytest.mark.parametrize("word", ["16k", "1:0", "1:2:3", "a:b", ""])
def test_scenario_that_cannot_be_read_is_named(word):
    with pytest.raises(ValueError, match=r"--scenario: .* write prompt:new tokens"):
        read_scenarios([word])


def test_papers_layouts_have_its_numbers_of_mixers():
    layouts = read_layouts([], PAPER_LAYOUTS, SHAPES["apriel-15b"]["num_hidden_layers"])
    mixers = {name: len(word) - word.count("a") for name, word in layouts.items()}
    assert mixers == {"teacher": 0, "H-25": 25, "H-30": 30, "H-40": 40, "H-30-gdn": 30, "H-40-gdn": 40}


def test_layouts_take_their_names_or_their_words():
    assert read_layouts(["x=am*2", "aamm"], {}, 4) == {"teacher": "aaaa", "x": "amam", "aamm": "aamm"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["am"], "'am' has 2 layers, the teacher 4"),
        (["am*x"], "repeats 'x' times"),
        (["x=am*2", "x=aaaa"], "the name 'x' is empty or taken"),
        (["teacher=am*2"], "the name 'teacher' is empty or taken"),
    ],
)
def test_layouts_that_cannot_be_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        read_layouts(words, {}, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["am*²"], "repeats '²' times"),
        (["am*99999999999"], "repeats '99999999999' times"),
        (["a/b=am*2"], "the name 'a/b' has a slash"),
    ],
)
def test_layouts_that_would_do_harm_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        read_layouts(words, {}, 4)


def test_scenario_given_twice_counts_once():
    assert read_scenarios(["1k:8k", "1024:8192"]) == (Scenario(1024, 8192),)

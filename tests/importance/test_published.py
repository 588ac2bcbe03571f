"""Published scores as a ranking, and what is said of files that are none."""

import pytest
from ranking_example import build_teacher, rank_stage

from hybridize.importance import load_ranking, rank_layers, save_ranking
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.transfer import convert

GOOD = "layer,mmlu,gsm8k\n-1,0.80,0.90\n2,0.70,0.90\n0,0.10,0.20\n1,0.80,0.90\n3,0.81,0.85\n"


def rank(tmp_path, text, model=None, **changes):
    file = tmp_path / "scores.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    teacher = build_teacher("llama")
    stage = rank_stage(method="import", scores=str(file), **changes)
    return rank_layers(model or teacher, teacher, (), (), stage, state_dir=tmp_path / "none")


def test_importance_is_the_mean_drop_over_the_tasks(tmp_path):
    ranking = rank(tmp_path, GOOD)
    assert ranking.scores == pytest.approx({0: 0.70, 1: 0.0, 2: 0.05, 3: 0.02})
    assert ranking.order == (1, 3, 2, 0)
    assert ranking.baseline == pytest.approx(0.85)
    assert ranking.unit == "accuracy lost"
    assert ranking.before is None
    assert ranking.cost["tokens"] == ranking.cost["tokens_scored"] == 0
    assert set(ranking.controls) == {"uniform", "random"}
    assert not (tmp_path / "none").exists()
    assert load_ranking(save_ranking(ranking, tmp_path / "ranking.json")) == ranking


def test_spreadsheets_ways_of_writing_are_read(tmp_path):
    text = "\ufeff" + GOOD.replace("\n", "\r\n").replace(",", ", ").replace("0.81", ' "0.81"'.strip()) + ",,\r\n\r\n"
    assert rank(tmp_path, text).scores == rank(tmp_path, GOOD).scores


def test_a_layer_that_is_a_mixer_already_needs_no_row_and_its_row_counts_for_nothing(tmp_path):
    hybrid, _ = convert(build_teacher("llama"), LayoutSpec.replace(4, [0, 2], Mamba1Spec(state_size=4)))
    lacking = "\n".join(line for line in GOOD.splitlines() if not line.startswith("2,"))
    for text in (GOOD, lacking):
        ranking = rank(tmp_path, text, hybrid)
        assert ranking.layers == (1, 3)
        assert ranking.scores == pytest.approx({1: 0.0, 3: 0.02})


FAULTS = {
    "empty": ("", r"scores\.csv: it is empty; write a line 'layer,<task>"),
    "blank": ("\n , \n", r"it is empty"),
    "header": ("depth,mmlu\n0,1\n", r"scores\.csv line 1: 'depth,mmlu' is no header; name the columns layer, then"),
    "no task": ("layer\n0\n", r"line 1: 'layer' is no header"),
    "task twice": ("layer,a,a\n-1,1,1\n", r"line 1: 'layer,a,a' is no header; .*each task once"),
    "unnamed task": ("layer,a,\n-1,1,1\n", r"line 1: .* is no header"),
    "word": (GOOD.replace("0.70", "high"), r"scores\.csv line 3 column mmlu: 'high' is no finite number; write"),
    "hole": (GOOD.replace("0.20", ""), r"line 4 column gsm8k: '' is no finite number"),
    "infinite": (GOOD.replace("0.20", "inf"), r"line 4 column gsm8k: 'inf' is no finite number"),
    "nan": (GOOD.replace("0.20", "nan"), r"line 4 column gsm8k: 'nan' is no finite number"),
    "layer": (GOOD.replace("\n0,", "\nx,"), r"line 4 column layer: 'x' is no layer number; write 0, 1, \.\.\."),
    "half a layer": (GOOD.replace("\n0,", "\n0.5,"), r"line 4 column layer: '0\.5' is no layer number"),
    "outside": (GOOD + "4,0,0\n", r"line 7 column layer: the model has no layer 4; it has 4, use 0\.\.3, or -1"),
    "below": (GOOD + "-2,0,0\n", r"line 7 column layer: the model has no layer -2"),
    "twice": (GOOD + "3,0,0\n", r"line 7: layer 3 has a row already; give each layer one"),
    "baseline twice": (GOOD + "-1,0,0\n", r"line 7: layer -1 has a row already"),
    "few cells": (GOOD + "3,0\n", r"line 7: 2 cells for the 3 columns layer, mmlu, gsm8k; give each"),
    "many cells": (GOOD + "3,0,0,0\n", r"line 7: 4 cells for the 3 columns"),
    "no baseline": (GOOD.replace("-1,0.80,0.90\n", ""), r"no row of layer -1, .*; add one .* of mmlu, gsm8k"),
    "layer missing": (GOOD.replace("2,0.70,0.90\n", ""), r"no score for layers \[2\], .* still; add a row for each"),
    "quote": (GOOD + '3,"0\n', r"scores\.csv line 7: it is not CSV \(.*\); mend the line"),
    "binary": (b"\x89PNG\r\n\x1a\n\xff", r"scores\.csv: it is not UTF-8 text"),
    "a null": (GOOD + "3,\0,0\n", r"line 7( column mmlu)?: "),
    "semicolons": (GOOD.replace(",", ";"), r"line 1: 'layer;mmlu;gsm8k' is no header"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_place_value_and_remedy(tmp_path, fault):
    text, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message) as caught:
        rank(tmp_path, text)
    assert str(tmp_path / "scores.csv") in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    stage = rank_stage(method="import", scores=str(tmp_path / "none.csv"))
    teacher = build_teacher("llama")
    with pytest.raises(ValueError, match=r"none\.csv: it cannot be read \(No such file.*\); check the path"):
        rank_layers(teacher, teacher, (), (), stage, state_dir=tmp_path)


def test_a_row_of_zeros_keeps_a_layer_to_the_last(tmp_path):
    """The remedy that the error names: published lists lack layers."""
    ranking = rank(tmp_path, GOOD.replace("2,0.70,0.90", "2,0,0"))
    assert ranking.order[-1] == 2

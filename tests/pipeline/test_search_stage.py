"""A search stage chooses a layout that the next stage converts to, and the report shows both."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridize.pipeline.planning import TeacherShape, plan_recipe, read_teacher_config
from hybridize.pipeline.progress import Reporter
from hybridize.pipeline.reporting import rewrite_report
from hybridize.pipeline.runner import run_recipe
from hybridize.spec.recipe import parse_recipe

QUIET = Reporter(quiet=True)


@pytest.fixture
def searched(tiny_recipe):
    """Two rankings, a search, and the layout that it finds, distilled."""
    rank = {
        "kind": "rank",
        "method": "perplexity",
        "tokens_per_step": 256,
        "sequence_length": 256,
        "heldout_rows": 1,
        "init": "neutral",
    }
    distill = tiny_recipe["stages"][2] | {"steps": 2}
    tiny_recipe["stages"] = [
        rank | {"name": "rank-m", "mixer": "mamba1"},
        rank | {"name": "rank-g", "mixer": "gated_delta_net"},
        {"kind": "search", "rankings": ["rank-m", "rank-g"], "num_layers": 3, "context_tokens": 512},
        {"kind": "convert", "search": "search", "init": "neutral"},
        distill,
        {"kind": "report"},
    ]
    return tiny_recipe


def test_search_is_converted_distilled_and_reported(searched):
    artifacts = run_recipe(parse_recipe(searched), QUIET)
    layout = artifacts["search"].metrics["layout"]
    kinds = {"a": "attention", "m": "mamba1", "g": "gated_delta_net"}
    assert artifacts["convert"].metrics["layout"] == [kinds[letter] for letter in layout]
    assert len(artifacts["convert"].metrics["layers"]) == 3
    run = Path(searched["output"])
    found = json.loads((run / "search" / "search.json").read_text())
    rankings = {"m": "rank-m", "g": "rank-g"}
    total = 0.0
    for layer, letter in enumerate(layout):
        if letter != "a":
            ranking = json.loads((run / rankings[letter] / "ranking.json").read_text())
            total += ranking["scores"][str(layer)] - ranking["baseline"]
    assert found["chosen"]["loss"] == pytest.approx(total)
    page = (run / "report" / "report.html").read_text()
    assert "A mixer for each layer" in page
    first = json.loads((run / "distill" / "metrics.jsonl").read_text().splitlines()[0])["loss_nats"]
    assert f"{first:.4g}" in page, "what was measured stands beside what was predicted"
    assert (run / "report" / "search.png").stat().st_size > 5000


def test_another_target_searches_anew_but_ranks_nothing_anew(searched):
    del searched["stages"][3:]
    before = run_recipe(parse_recipe(searched), QUIET)
    searched["stages"][2]["num_layers"] = 2
    after = run_recipe(parse_recipe(searched), QUIET)
    same = {name for name in before if before[name].manifest == after[name].manifest}
    assert same == {"rank-m", "rank-g"}


def test_rankings_over_other_data_are_refused(searched):
    searched["stages"][1]["data"] = {"source": "world", "levels": [2]}
    del searched["stages"][3:]
    message = r"search\.rankings: rank-g was made from another data than rank-m"
    with pytest.raises(ValueError, match=message):
        run_recipe(parse_recipe(searched), QUIET)


def test_plan_takes_a_search_for_what_it_may_find(searched, tiny_teacher):
    shape = TeacherShape.of(read_teacher_config(str(tiny_teacher)))
    costs = {cost.name: cost for cost in plan_recipe(parse_recipe(searched), shape)}
    assert costs["search"].what == "a mixer for each layer by rank-m, rank-g; no training"
    assert costs["convert"].what == "up to 3 of 4 layers to what search finds, init neutral"
    assert costs["distill"].trained > shape.parameters


def test_more_layers_than_the_teacher_has_are_refused_first(searched):
    searched["stages"][2]["num_layers"] = 5
    with pytest.raises(ValueError, match=r"recipe\.stages\[2\]\.num_layers: 5 is out of range.*1\.\.4"):
        run_recipe(parse_recipe(searched), QUIET)
    assert not (Path(searched["output"]) / "rank-m").exists()


def test_report_of_a_searched_or_written_layout_can_be_written_anew(searched):
    searched["stages"] = [*searched["stages"][:4], {"name": "written", "kind": "convert", "layout": "amaa"}]
    run_recipe(parse_recipe(searched), QUIET)
    page = rewrite_report(Path(searched["output"])).read_text()
    assert "A mixer for each layer" in page
    assert "Stale:" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "h300"}, r"^recipe\.stages\[2\]\.gpu: 'h300' is unknown; use one of h200, h100.*did you mean 'h200'"),
        ({"gpu": "h100", "scenario": "1k"}, r"^recipe\.stages\[2\]\.scenario: '1k' is no scenario; write prompt:new"),
    ],
)
def test_an_unknown_gpu_is_refused_before_anything_is_done(searched, change, message):
    searched["stages"][2] |= change
    with pytest.raises(ValueError, match=message):
        run_recipe(parse_recipe(searched), QUIET)
    assert not (Path(searched["output"]) / "rank-m").exists()


def test_search_by_predicted_speed_says_what_it_reckoned_with(searched):
    searched["stages"] = searched["stages"][:3]
    searched["stages"][2] |= {"gpu": "l40s", "scenario": "64:1k"}
    run = Path(searched["output"])
    run_recipe(parse_recipe(searched), QUIET)
    found = json.loads((run / "search" / "search.json").read_text())
    assert found["cost_unit"] == "predicted seconds a token in vLLM on one l40s, 64 -> 1k tokens"
    assert 0 < found["chosen"]["cost"] < 1e-3


def test_a_ranking_of_another_model_is_refused(searched):
    from hybridize.pipeline.stages.searching import search_for

    other = SimpleNamespace(num_layers=16)
    with pytest.raises(ValueError, match=r"far.json: it ranks a model of 16 layers, but the teacher has 4; rank this"):
        search_for(None, {"far.json": other}, {"num_hidden_layers": 4})

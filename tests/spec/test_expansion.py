"""A schedule and a control are spelled out as the stages they stand for."""

from pathlib import Path

import pytest

from hybridize.spec.expansion import expand
from hybridize.spec.recipe import load_recipe, parse_recipe
from hybridize.spec.stages import ConvertStage, DistillStage, RankStage

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(*stages, **changes):
    return parse_recipe({"name": "r", "teacher": "./t", "stages": list(stages), **changes})


def schedule(**changes):
    return {"kind": "schedule", "name": "h", "layers": [25, 27, 30], "of": 50, "distill": {"steps": 3}} | changes


def test_schedule_ranks_converts_and_distils_the_current_hybrid_each_time():
    stages = expand(recipe(schedule(layers=[2, 3], of=None)), 4).stages
    assert [stage.name for stage in stages] == [
        "h-2-rank",
        "h-2-convert",
        "h-2-distill",
        "h-3-rank",
        "h-3-convert",
        "h-3-distill",
    ]
    first_rank, first_convert, first_distill, rank, convert, distill = stages
    assert first_rank.model == first_convert.model == "teacher"
    assert (first_convert.ranking, first_convert.num_layers) == ("h-2-rank", 2)
    assert first_distill.model == "h-2-convert"
    assert rank.model == convert.model == "h-2-distill"
    assert (convert.ranking, convert.num_layers) == ("h-3-rank", 1), "only the further layers"
    assert distill.model == "h-3-convert"


def test_paper_counts_scale_to_the_depth():
    counts = [s.name for s in expand(load_recipe(RECIPES / "pocket-h1.yaml"), 16).stages if s.name.endswith("-distill")]
    assert counts == [f"h1-{n}-distill" for n in (8, 9, 10, 11, 12, 13)]
    counts = [s.name for s in expand(load_recipe(RECIPES / "apriel-h1-15b.yaml"), 50).stages if "-distill" in s.name]
    assert counts == [f"h1-{n}-distill" for n in (25, 27, 30, 34, 37, 40)]


def test_counts_that_scale_to_one_become_one_with_the_later_settings():
    distill = [{"steps": 1}, {"steps": 2}, {"steps": 3}]
    stages = expand(recipe(schedule(distill=distill)), 8).stages  # 25, 27, 30 of 50 -> 4, 4, 5 of 8
    assert [(s.name, s.steps) for s in stages if isinstance(s, DistillStage)] == [
        ("h-4-distill", 2),
        ("h-5-distill", 3),
    ]
    assert [s.num_layers for s in stages if isinstance(s, ConvertStage)] == [4, 1]


def test_settings_of_a_stage_go_to_that_stage_alone():
    rank = [{"method": "loo"}, {"steps": 7}, {"steps": 8}]
    stages = expand(recipe(schedule(rank=rank, mixer={"type": "mamba1", "state_size": 4}, init="random")), 50).stages
    ranks = [s for s in stages if isinstance(s, RankStage)]
    assert [(r.method, r.steps) for r in ranks] == [("loo", 100), ("mmr", 7), ("mmr", 8)]
    assert all(r.mixer.state_size == 4 and r.init == "random" for r in ranks)
    assert all(s.mixer.state_size == 4 and s.init == "random" for s in stages if isinstance(s, ConvertStage))


def test_fit_comes_before_the_first_distillation_only():
    stages = expand(recipe(schedule(fit={"steps": 2})), 50).stages
    assert [s.name for s in stages if s.kind == "fit"] == ["h-25-fit"]
    models = {s.name: s.model for s in stages if s.kind in ("fit", "distill")}
    assert models == {
        "h-25-fit": "h-25-convert",
        "h-25-distill": "h-25-fit",
        "h-27-distill": "h-27-convert",
        "h-30-distill": "h-30-convert",
    }


def test_judgement_and_speed_follow_each_stage():
    stages = expand(recipe(schedule(evaluate={"level": 1}, throughput={"new_tokens": 8})), 50).stages
    judged = [(s.name, s.model, s.label) for s in stages if s.kind in ("evaluate", "throughput")]
    assert judged[:2] == [("h-25-judge", "h-25-distill", "25 of 50"), ("h-25-speed", "h-25-distill", "25 of 50")]
    assert len(judged) == 6
    named = expand(recipe(schedule(evaluate={"level": 1}, throughput={"new_tokens": 8}, label="ours")), 50).stages
    assert {s.label for s in named if s.name.startswith("h-27-") and s.kind in ("evaluate", "throughput")} == {
        "ours, 27 of 50"
    }


def test_others_refer_to_a_schedule_by_its_name_or_by_a_count_as_written():
    later = [
        {"kind": "evaluate", "name": "last", "model": "h"},
        {"kind": "evaluate", "name": "middle", "model": "h-27-distill"},
        {"kind": "merge", "sources": ["h", "h-25-distill"]},
        {"kind": "merge", "name": "ties", "method": "ties", "sources": ["h", "h-27-distill"], "base": "h-25-distill"},
    ]
    *_, last, middle, merge, ties = expand(recipe(schedule(), *later), 16).stages  # 25, 27, 30 of 50 -> 8, 9, 10 of 16
    assert last.model == "h-10-distill"
    assert middle.model == "h-9-distill"
    assert merge.sources == ("h-10-distill", "h-8-distill")
    assert ties.base == "h-8-distill"


def test_a_count_that_the_schedule_has_not_is_named():
    with pytest.raises(ValueError, match=r"stages\[1\]\.model: 'h-26-distill' is unknown.*did you mean 'h-2.-distill'"):
        recipe(schedule(), {"kind": "evaluate", "model": "h-26-distill"})


def test_teacher_control_is_the_same_stage_on_the_teacher():
    sft = {"kind": "sft", "model": "convert", "steps": 5, "learning_rate": 1e-3, "teacher_control": True}
    judge = {"kind": "evaluate", "model": "sft-teacher"}
    _, hybrid, control, judged = expand(recipe({"kind": "convert", "layers": [1]}, sft, judge), 4).stages
    assert (control.name, control.model) == ("sft-teacher", "teacher")
    assert control.model_dump(exclude={"name", "model"}) == hybrid.model_dump(exclude={"name", "model"})
    assert judged.model == control.name


def test_a_recipe_with_nothing_to_spell_out_stays_itself():
    plain = recipe({"kind": "convert", "layers": [1]})
    assert expand(plain, 4) is plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [3, 2], "of": None}, r"layers: \[3, 2\] must be at least 1 and rise"),
        ({"layers": [60]}, "layers: 60 is more than of, 50"),
        ({"distill": [{"steps": 1}, {"steps": 2}]}, "distill: 2 settings for 3 stages; give one, or one for each"),
        ({"rank": [{}, {}]}, "rank: 2 settings for 3 stages"),
        ({"distill": {"stps": 1}}, r"distill\[0\]\.stps: unknown key; did you mean 'steps'"),
    ],
)
def test_faults_of_a_schedule_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(schedule(**changes))


def test_more_layers_than_the_teacher_has_is_an_error():
    with pytest.raises(ValueError, match=r"recipe\.stages\[0\]\.layers: 5 is more than the teacher has, 4; use 1\.\.4"):
        expand(recipe(schedule(layers=[5], of=None)), 4)


def test_a_name_that_a_schedule_needs_cannot_be_taken():
    with pytest.raises(ValueError, match="'h-2-rank' is taken"):
        expand(recipe({"kind": "rank", "name": "h-2-rank"}, schedule(layers=[2], of=None)), 4)


def test_on_policy_batches_are_cut_from_prompts_not_from_tokens():
    stage = {"kind": "on_policy", "model": "convert", "steps": 1, "prompts_per_step": 48, "rows_per_batch": 48}
    recipe({"kind": "convert", "layers": [1]}, stage)
    with pytest.raises(ValueError, match="prompts_per_step 48 is not a whole number of batches of 32"):
        recipe({"kind": "convert", "layers": [1]}, stage | {"rows_per_batch": 32})


def test_a_control_cannot_train_mixers_that_it_has_not():
    sft = {"kind": "sft", "model": "convert", "steps": 5, "train": "mixers", "teacher_control": True}
    with pytest.raises(ValueError, match="teacher_control: the teacher has no mixers to train"):
        recipe({"kind": "convert", "layers": [1]}, sft)


def test_a_schedule_judges_in_several_ways():
    ways = [{"level": 1}, {"levels": {"swaps": 4}, "problems_per_task": 3}]
    stages = {stage.name: stage for stage in expand(recipe(schedule(layers=[2], of=None, evaluate=ways)), 4).stages}
    assert [stages[name].difficulty for name in ("h-2-judge", "h-2-judge-2")] == [
        "level 1",
        "levels 2 (quantities), 2 (addition), 4 (swaps), 2 (recall)",
    ]
    assert stages["h-2-judge-2"].model == "h-2-distill"
    assert stages["h-2-judge-2"].label == "2 of 4"


def test_a_schedule_leaves_other_stages_as_they_are_written():
    stages = expand(recipe({"kind": "convert", "layout": "aaam"}, schedule(layers=[2], of=None)), 4).stages
    assert stages[0].layout == "aaam"

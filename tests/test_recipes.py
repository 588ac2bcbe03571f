"""Every shipped recipe is sound, fits its teacher, and has a plan."""

import json
from pathlib import Path

import pytest

from hybridize.pipeline.planning import TeacherShape, plan_recipe, read_teacher_config
from hybridize.pipeline.runner import check_against_teacher
from hybridize.spec.expansion import expand
from hybridize.spec.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))

APRIEL = {
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "num_hidden_layers": 50,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "tie_word_embeddings": False,
}
"""Of the recipe's teacher on the hub, which no test may ask."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_its_teacher_and_has_a_plan(path, tmp_path):
    recipe = load_recipe(path)
    if not Path(recipe.teacher).is_dir():
        (tmp_path / "config.json").write_text(json.dumps(APRIEL))
        recipe = recipe.model_copy(update={"teacher": str(tmp_path)})
    num_layers = check_against_teacher(recipe)
    costs = plan_recipe(recipe, TeacherShape.of(read_teacher_config(recipe.teacher)))
    assert [cost.name for cost in costs] == [stage.name for stage in expand(recipe, num_layers).stages]


def test_the_papers_recipe_costs_what_its_tokens_say(tmp_path):
    recipe = load_recipe(RECIPES[0].parent / "apriel-h1-15b.yaml")
    costs = {cost.name: cost for cost in plan_recipe(recipe, TeacherShape.of(APRIEL))}
    distilled = [cost.tokens for name, cost in costs.items() if name.endswith("-distill")]
    cumulated = [sum(distilled[: i + 1]) / 1e9 for i in range(len(distilled))]
    assert cumulated == pytest.approx([26, 31.5, 37, 63, 89, 136.5], abs=0.05), "the paper's table"
    assert costs["sft"].tokens / 1e9 == pytest.approx(20.9, abs=0.05)
    assert costs["h1-25-distill"].memory > 16 * 14e9, "weights, gradients and optimiser of 15B parameters"


def test_the_studys_head_says_what_its_plan_says():
    path = RECIPES[0].parent / "study-h1.yaml"
    recipe = load_recipe(path)
    shape = TeacherShape.of(read_teacher_config(recipe.teacher))
    costs = plan_recipe(recipe, shape)
    head = " ".join(path.read_text().partition("\nname:")[0].replace("#", "").split())
    work = sum(cost.operations for cost in costs) / 1e15
    assert f"The plan: {len(costs)} stages, {sum(cost.tokens for cost in costs):,} tokens" in head
    assert f"{work:.1f} PFLOP" in head
    answers = sum(s.problems_per_task * len(s.tasks) for s in expand(recipe, 16).stages if s.kind == "evaluate")
    assert f"{answers:,} answers" in head


def test_no_model_of_the_study_takes_more_than_a_twentieth_of_the_teachers_tokens():
    stages = expand(load_recipe(RECIPES[0].parent / "study-h1.yaml"), 16).stages
    spent: dict[str, int] = {"teacher": 0}
    for stage in stages:
        if stage.kind in ("convert", "fit", "distill", "sft"):
            own = 0 if stage.kind == "convert" else stage.steps * stage.tokens_per_step
            spent[stage.name] = spent[stage.model] + own
    assert max(spent.values()) / 426e6 < 0.05
    for count, prefix in ((13, "d-most"), (10, "d-")):
        controls = {spent.pop(s.name) for s in stages if s.name in spent and s.name.startswith(prefix)}
        assert controls == {spent[f"h1-{count}-distill"]}, "every control takes the tokens that the family took"


def test_answers_of_the_studys_longer_problems_are_two_and_four_times_as_long():
    from transformers import AutoTokenizer

    from hybridize.data.chat import render
    from hybridize.data.world import draw_problem

    recipe = load_recipe(RECIPES[0].parent / "study-h1.yaml")
    tokenizer = AutoTokenizer.from_pretrained(recipe.teacher)
    stages = {stage.name: stage for stage in expand(recipe, 16).stages}

    def length(task: str, level: int) -> float:
        chats = [render(tokenizer, draw_problem(task, level, "test", i).messages) for i in range(20)]
        # The lookups of `recall` cannot grow so far; there the whole sequence counts.
        skipped = [0 if task == "recall" else chat.num_prompt_tokens for chat in chats]
        return sum(len(chat.input_ids) - skip for chat, skip in zip(chats, skipped, strict=True)) / len(chats)

    for name, times in (("judge-teacher-twice", 2), ("judge-teacher-fourfold", 4)):
        for task in stages[name].tasks:
            trained = sum(length(task, level) for level in recipe.data.levels) / len(recipe.data.levels)
            assert length(task, stages[name].level_of(task)) / trained == pytest.approx(times, rel=0.2), (task, times)


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} == {"demo", "pocket-h1", "apriel-h1-15b", "study-h1"}

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


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} == {"demo", "pocket-h1", "apriel-h1-15b"}

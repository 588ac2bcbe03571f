"""Every shipped recipe is sound, fits its teacher, and has a plan."""

from pathlib import Path

import pytest

from hybridize.pipeline.planning import TeacherShape, plan_recipe, read_teacher_config
from hybridize.pipeline.runner import check_against_teacher
from hybridize.spec.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_its_teacher_and_has_a_plan(path):
    recipe = load_recipe(path)
    check_against_teacher(recipe)
    config = read_teacher_config(recipe.teacher)
    if config is not None:
        costs = plan_recipe(recipe, TeacherShape.of(config))
        assert [cost.name for cost in costs] == [stage.name for stage in recipe.stages]


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"demo"}

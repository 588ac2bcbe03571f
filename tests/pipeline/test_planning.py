"""Costs are worked out from a config alone, and parameter counts are exact."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hybridize.pipeline.planning import TeacherShape, mixer_parameters, plan_recipe, read_teacher_config
from hybridize.spec.mixers import AttentionSpec, Mamba1Spec
from hybridize.spec.recipe import parse_recipe


def test_parameters_match_the_model(tiny_teacher, tiny_recipe):
    from hybridize.models import load_teacher
    from hybridize.spec.layout import LayoutSpec
    from hybridize.transfer import convert

    shape = TeacherShape.of(read_teacher_config(str(tiny_teacher)))
    teacher = load_teacher(tiny_teacher)
    assert shape.parameters == teacher.num_parameters()
    hybrid, _ = convert(teacher, LayoutSpec.replace(4, [1, 2], Mamba1Spec()))
    cost = next(c for c in plan_recipe(parse_recipe(tiny_recipe), shape) if c.name == "distill")
    assert cost.trained == hybrid.num_parameters()
    assert mixer_parameters(AttentionSpec(), shape) == shape.attention_parameters


def test_plan_counts_tokens(tiny_recipe, tiny_teacher):
    shape = TeacherShape.of(read_teacher_config(str(tiny_teacher)))
    costs = {cost.name: cost for cost in plan_recipe(parse_recipe(tiny_recipe), shape)}
    assert costs["rank"].tokens == 4 * 2 * 256
    assert costs["distill"].tokens == 6 * 256
    assert costs["distill"].operations == 6 * 256 * 8 * shape.active_parameters


@pytest.mark.parametrize(("content", "message"), [("{", "is not valid JSON"), ("{}", "has no 'num_attention_heads'")])
def test_teacher_config_faults_are_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_teacher_config(str(tmp_path))


def test_plan_imports_no_torch(tiny_recipe, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tiny_recipe))
    code = (
        "import sys\n"
        f"sys.argv = ['hybridize', 'plan', {str(recipe)!r}]\n"
        "from hybridize.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert "mmr: 2 steps for each of 4 layers" in " ".join(done.stdout.split())

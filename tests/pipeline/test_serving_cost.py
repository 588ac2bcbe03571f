"""Planning of serving: sizes are those of the real models, and nothing heavy is imported."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hybridize.bench.prediction import GPUS, UNCACHED_SEQUENCES
from hybridize.bench.scenarios import SHAPES, Scenario
from hybridize.pipeline.planning import read_teacher_config
from hybridize.pipeline.serving_cost import (
    LayerSizes,
    plan_serving,
    read_gpu,
    read_serving_teacher,
    served_shape,
)
from hybridize.pipeline.sizes import TeacherShape
from hybridize.spec.mixers import MIXER_TYPES

STATEFUL = ("mamba1", "mamba2", "gated_delta_net", "kimi_delta_attention")


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("ssm", ["float32", "bfloat16"])
def test_state_has_the_size_of_its_page_in_vllms_cache(kind, ssm):
    from hybridize.mixers import build_mixer
    from hybridize.serving.pages import StatePage

    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    config = sizes | {"num_hidden_layers": 1, "intermediate_size": 1, "vocab_size": 1}
    spec = MIXER_TYPES[kind]().resolve(TeacherShape.of(config).geometry)
    shapes = build_mixer(spec, 96).state_shapes(1)
    page = StatePage.of(shapes, getattr(torch, ssm), torch.bfloat16)
    assert LayerSizes(config, state_dtype=ssm).of(spec).states == (page.num_bytes,)


def test_weights_are_those_of_the_model(tiny_teacher):
    from hybridize.models import load_teacher
    from hybridize.spec.layout import LayoutSpec
    from hybridize.transfer import convert

    config = read_teacher_config(str(tiny_teacher))
    hybrid, _ = convert(load_teacher(tiny_teacher), LayoutSpec.read("am2g"))
    shape = served_shape(config, "am2g")
    assert shape.weight_bytes == 2 * hybrid.num_parameters()
    embedding = hybrid.get_input_embeddings().weight.numel()
    unread = 0 if config["tie_word_embeddings"] else embedding
    assert shape.read_bytes == 2 * (hybrid.num_parameters() - unread)
    assert len(shape.states) == 3
    assert shape.windows == (None,)


def test_papers_teacher_keeps_200_kib_a_token():
    shape = served_shape(SHAPES["apriel-15b"], "a" * 50)
    assert shape.context_bytes(1) == 200 * 1024
    assert shape.weight_bytes == pytest.approx(29.95e9, rel=1e-3)
    h40 = served_shape(SHAPES["apriel-15b"], "ammmm" * 10)
    assert h40.context_bytes(1) == 40 * 1024
    assert sum(h40.states) == 40 * (256 + 24) * 1024


def test_windows_and_nothing_have_their_place():
    shape = served_shape(SHAPES["pocket"], "asim")
    assert shape.windows == (None, 4096)
    assert len(shape.states) == 1
    own = served_shape(SHAPES["pocket"] | {"sliding_window": 64}, "aaas")
    assert own.windows == (64, 64, 64, 4096)


def test_plan_predicts_every_model_in_every_scenario_and_warns():
    scenarios = (Scenario(1, 16384), Scenario(1024, 8192))
    layouts = {"teacher": "a" * 50, "H-40": "ammmm" * 10, "H-47": "aaa" + "m" * 47}
    plan = plan_serving(SHAPES["apriel-15b"], layouts, GPUS["h200"], scenarios)
    assert [(name, scenario) for name, scenario, _ in plan.rows] == [(n, s) for s in scenarios for n in layouts]
    assert len(plan.warnings) == 1
    assert plan.warnings[0].startswith("H-47: ")
    by_name = {name: prediction for name, scenario, prediction in plan.rows if scenario == scenarios[0]}
    assert by_name["H-40"].sequences > 4 * by_name["teacher"].sequences
    half = plan_serving(SHAPES["apriel-15b"], layouts, GPUS["h200"], scenarios, state_dtype="bfloat16")
    assert half.rows[1][2].sequences >= plan.rows[1][2].sequences


def test_gpu_is_given_by_name_or_by_its_sizes():
    assert read_gpu("h200", None, None) == GPUS["h200"]
    custom = read_gpu(None, 48.0, 1.0)
    assert (custom.memory, custom.copy_bandwidth, custom.step_tokens) == (48 * 2**30, 0.9e12, 8192)
    assert read_gpu("h200", 100.0, None).copy_bandwidth == GPUS["h200"].copy_bandwidth


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read_gpu(None, 48.0, None), "--gpu: it is missing; give one of h200"),
        (lambda: read_gpu("h201", None, None), "--gpu.*h201.*h200"),
        (lambda: read_gpu("h200", 0.0, None), "--memory-gib: 0 is out of range"),
        (lambda: read_serving_teacher("apriel"), "--teacher.*apriel.*apriel-15b"),
        (lambda: read_serving_teacher("/nowhere"), "there is no folder /nowhere"),
        (lambda: served_shape(SHAPES["pocket"], "aaxa"), r"--layout\[2\]: 'x' stands for nothing"),
        (lambda: served_shape(SHAPES["pocket"], "aama", state_dtype="float16"), "--state-dtype.*float16"),
        (
            lambda: plan_serving(SHAPES["pocket"], {"teacher": "aaaa"}, GPUS["h200"], (), utilization=2.0),
            "--gpu-memory-utilization: 2.0 is out of range",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def command(*words):
    code = (
        "import sys\n"
        f"sys.argv = ['hybridize', 'plan', *{list(words)!r}]\n"
        "from hybridize.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code or 0\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_command_plans_serving_without_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["apriel-15b"] | {"num_hidden_layers": 48}))
    words = ["--teacher", str(tmp_path), "--layout", "half=am*24", "--layout", f"most=aaa{'m' * 45}"]
    done = command("--serve", *words, "--gpu", "h200", "--price-per-hour", "4", "--scenario", "1:16k")
    assert done.returncode == 0, done.stderr
    rows = {cells[2]: cells for line in done.stdout.splitlines() if len(cells := line.split("│")) > 5}
    assert [name.strip() for name in rows][-3:] == ["teacher", "half", "most"]
    assert "$ per M tokens" in done.stdout
    assert "warning: most: 3 attention + 45 mixer layers make 16 groups of 3" in done.stdout
    teacher = next(cells for name, cells in rows.items() if name.strip() == "teacher")
    rate, price = (float(teacher[i].strip().replace(",", "")) for i in (7, 9))
    assert price == pytest.approx(4e6 / 3600 / rate, rel=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "plan: the recipe is missing; give a YAML file, or --serve"),
        (["x.yaml", "--serve"], "plan --serve: it reads no recipe, but x.yaml is given"),
        (["--serve"], "--gpu: it is missing"),
        (["--serve", "--gpu", "h200", "--teacher", "pocket"], "no layout for pocket"),
    ],
)
def test_command_names_what_is_missing(words, message):
    done = command(*words)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_model_too_large_and_one_without_a_cache_are_told_apart():
    config = dict(SHAPES["apriel-15b"])
    small = replace(GPUS["h200"], memory=10e9)
    plan = plan_serving(config, {"teacher": "a" * 50}, small, [Scenario(1, 1024)])
    assert plan.rows[0][2].sequences == 0
    assert plan.warnings == ("teacher: weights 29.9 GB do not fit in 9.0 GB",)
    empty = plan_serving(config, {"none": "i" * 50}, GPUS["h200"], [Scenario(1, 1024)])
    assert empty.rows[0][2].sequences == UNCACHED_SEQUENCES
    assert not empty.warnings

"""What `bench serve --run` serves of a run: each judged layout once, whatever was left on another machine."""

import json
import shutil
import sys

import pytest
from judged_run import CONFIG, make_run

from hybridize.pipeline.served import served_models
from hybridize.pipeline.serving_cost import served_shape


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def named(run):
    return [(model.name, model.word) for model in served_models(run)[0]]


EACH_ONCE = [("teacher", "aaaa"), ("two", "amam"), ("wide", "amam"), ("mixed", "agam")]


def test_each_judged_layout_is_served_once_by_the_first_model_that_has_it(run):
    models, notes = served_models(run)
    assert [(model.name, model.word) for model in models] == EACH_ONCE
    assert not notes
    assert models[0].config == CONFIG
    assert models[1].shape == served_shape(CONFIG, "amam")
    assert [mixer.state_size for mixer in models[2].layout.layers[1::2]] == [32, 32]
    assert sum(models[2].shape.states) > sum(models[1].shape.states)


def test_teacher_that_is_gone_is_read_from_a_hybrid(run, tmp_path):
    shutil.rmtree(tmp_path / "teacher")
    models, _ = served_models(run)
    assert [(model.name, model.word) for model in models] == EACH_ONCE
    assert [model.shape for model in models[:1]] == [served_shape(CONFIG, "aaaa")]
    config = models[0].config
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert not {"mixers", "layer_types", "attention_types"} & config.keys()
    from transformers import AutoConfig

    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path / "again").num_hidden_layers == 4


def test_layouts_without_configs_come_from_the_conversions_manifests(run):
    for name in ("two", "again", "wide", "mixed", "none"):
        (run / name / "config.json").unlink()
    models, _ = served_models(run)
    assert [(model.name, model.word) for model in models] == EACH_ONCE
    assert [mixer.state_size for mixer in models[2].layout.layers[1::2]] == [32, 32]


def test_models_of_unknown_layout_are_named(run):
    shutil.rmtree(run / "mixed")
    models, (note,) = served_models(run)
    assert [model.name for model in models] == ["teacher", "two", "wide"]
    assert note.startswith("mixed: neither a config.json nor a conversion in ")


def test_models_that_were_not_judged_are_not_served(run):
    shutil.rmtree(run / "judge-wide")
    manifest = json.loads((run / "judge-two" / "manifest.json").read_text())
    manifest["spec"]["model"] = "other"  # as an older recipe had it
    (run / "judge-two" / "manifest.json").write_text(json.dumps(manifest))
    (run / "judge-mixed" / "manifest.json").write_text("{")
    assert named(run) == [("teacher", "aaaa"), ("again", "amam")]


def test_nothing_to_serve_is_named(run, tmp_path):
    for folder in run.glob("judge-*"):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"no model of .* was judged yet"):
        served_models(run)
    with pytest.raises(ValueError, match="so it is no run"):
        served_models(tmp_path)


def test_run_that_says_no_shape_is_named(run, tmp_path):
    shutil.rmtree(tmp_path / "teacher")
    for file in run.glob("*/config.json"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no model in it has a config\.json.*there is no folder .*teacher.*; bring"):
        served_models(run)


def command(monkeypatch, capsys, *words):
    """Exit code, what was asked of `measure_serving`, and what was said."""
    from hybridize import cli
    from hybridize.bench import serving

    asked = []

    def measure(models, scenarios, out, *, only, **_):
        asked.append(([model.name for model in models], only, out))
        return []

    monkeypatch.setattr(serving, "measure_serving", measure)
    monkeypatch.setattr(sys, "argv", ["hybridize", "bench", "serve", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0, asked, capsys.readouterr().err


def test_command_measures_a_run_into_its_folder(run, monkeypatch, capsys):
    names = ["teacher", "two", "wide", "mixed"]
    code, asked, _ = command(monkeypatch, capsys, "--run", run)
    assert (code, asked) == (0, [(names, names, run / "serving.jsonl")])
    code, asked, _ = command(monkeypatch, capsys, "--run", run, "--only", "wide", "--out", run / "other.jsonl")
    assert asked == [(["wide", "teacher", "two", "mixed"], ["wide"], run / "other.jsonl")]
    code, asked, said = command(monkeypatch, capsys, "--run", run, "--only", "again")
    assert (code, asked) == (2, [])
    assert "two" in said


@pytest.mark.parametrize("option", [("--teacher", "apriel-15b"), ("--layout", "am*2")])
def test_command_takes_a_run_or_a_teacher_with_layouts(run, monkeypatch, capsys, option):
    code, asked, said = command(monkeypatch, capsys, "--run", run, *option)
    assert (code, asked) == (2, [])
    assert "--run: it says the teacher and the layouts; leave out --teacher and --layout" in said

"""A run's report shows what was measured in vLLM, of every model with a layout, and is redone when that changes."""

import json
import shutil

import pytest
from judged_run import CONFIG, add_record, evaluation, make_run

from hybridize.bench.scenarios import SHAPES
from hybridize.bench.serving import ServedModel
from hybridize.pipeline import reporting
from hybridize.pipeline.artifacts import make_artifact, read_artifact
from hybridize.pipeline.collecting import collect
from hybridize.pipeline.served import read_run, served_models
from hybridize.pipeline.serving_cost import served_shape
from hybridize.report import plots
from hybridize.report.numbers import TIMES
from hybridize.report.study import frontier, main_setting, settings
from hybridize.report.summary import headline

RATES = {"teacher": 1000.0, "two": 1500.0, "wide": 1400.0, "mixed": 1450.0}


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path)
    for model in served_models(run)[0]:
        add_record(run / "serving.jsonl", model, RATES[model.name])
    return run


def plain(text):
    return " ".join(text.replace(TIMES, "x").split())


def collected(run):
    written, num_layers = read_run(run)
    artifacts = {stage.name: read_artifact(run / stage.name, may_lack=".safetensors") for stage in written.stages}
    return collect(written, num_layers, {name: a for name, a in artifacts.items() if a}, run=run)


def test_models_that_share_a_layout_share_its_speed(run):
    data = collected(run)
    assert not data.throughput_notes
    (setting,) = settings(data)
    assert setting.measured == {"teacher": 1, "two": 1, "wide": 0, "mixed": 0}
    assert {name: setting.of(name).value for name in setting.speeds} == {
        "teacher": 1.0,
        "none": 1.0,
        "two": 1.5,
        "again": 1.5,
        "wide": 1.4,
        "mixed": 1.45,
    }
    assert setting.of("two").low == pytest.approx(1.485)
    assert setting.of("two").high == pytest.approx(1.53)
    assert str(setting) == "vLLM 0.26.0 on NVIDIA H200, 1 to 16k tokens, as many sequences as the memory holds"
    place = frontier(data)
    assert plain(place.label) == "throughput in vLLM, x the teacher's; 1 to 16k tokens, NVIDIA H200"
    assert {point.model.name for point in place.points} == {"teacher", "two", "again", "wide", "mixed", "none"}
    assert "as many tokens per second in vLLM (1 to 16k tokens, NVIDIA H200)" in plain(headline(data))


def test_other_scenarios_machines_and_options_are_other_settings(run):
    file, (teacher, two, *_) = run / "serving.jsonl", served_models(run)[0]
    add_record(file, two, 700.0, prompt_tokens=1024, new_tokens=8192)
    add_record(file, two, 600.0, device="NVIDIA H100")
    add_record(file, two, 500.0, method="whole", asked={"utilization": 0.5, "max_sequences": 64, "step_tokens": 2048})
    add_record(file, teacher, 9.0, device="cpu", vllm="0.32.0")
    data = collected(run)
    assert [str(setting) for setting in settings(data)][1:] == [
        "vLLM 0.26.0 on NVIDIA H200, 1k to 8k tokens, as many sequences as the memory holds",
        "vLLM 0.26.0 on NVIDIA H100, 1 to 16k tokens, as many sequences as the memory holds",
        "vLLM 0.26.0 on NVIDIA H200, 1 to 16k tokens, as many sequences as the memory holds, at most 64, 50% of it for "
        "vLLM, at most 2048 tokens a step, run in full",
        "vLLM 0.32.0 on a CPU, 1 to 16k tokens, as many sequences as the memory holds, at most 8",
    ]
    assert len(main_setting(data).speeds) == 6
    assert not settings(data)[1].is_relative


def test_a_later_record_counts(run):
    add_record(run / "serving.jsonl", served_models(run)[0][1], 2000.0)
    assert settings(collected(run))[0].of("two").value == 2.0


def test_records_of_no_judged_model_are_named_and_left_out(run):
    strange = SHAPES["apriel-15b"]
    file = run / "serving.jsonl"
    add_record(file, ServedModel("large", "am" * 25, strange, served_shape(strange, "am" * 25)), 1.0)
    wider = CONFIG | {"hidden_size": 256}
    add_record(file, ServedModel("wider", "amam", wider, served_shape(wider, "amam")), 1.0)
    add_record(file, served_models(run)[0][1], 1.0, state_dtype="bfloat16")  # whose states would be smaller
    add_record(file, served_models(run)[0][2], 1.0, state_dtype="int3")
    with file.open("a") as stream:
        stream.write('{"model": "H')
    data = collected(run)
    assert len(data.throughput) == 6
    torn, strangers = data.throughput_notes
    assert torn.startswith("serving.jsonl, line 9: not whole")
    assert "4 records of layouts or shapes that no judged model here has (large, wider, two, wide)" in strangers


def test_states_in_bfloat16_are_a_setting_of_their_own(run):
    (two,) = [model for model in served_models(run, "bfloat16")[0] if model.name == "two"]
    add_record(run / "serving.jsonl", two, 1800.0, state_dtype="bfloat16")
    data = collected(run)
    assert not data.throughput_notes
    assert str(settings(data)[1]).endswith(", states in bfloat16")
    assert set(settings(data)[1].speeds) == {"two", "again"}


def test_run_that_says_no_shape_has_a_note_in_place_of_speeds(run, tmp_path):
    shutil.rmtree(tmp_path / "teacher")
    for file in run.glob("*/config.json"):
        file.unlink()
    written, num_layers = read_run(run)
    made = make_artifact(tmp_path / "judge", kind="x", key="x", spec={}, inputs={}, work=lambda _: evaluation())
    data = collect(written, num_layers, {"judge-teacher": made}, run=run)
    assert not data.throughput
    assert "no model in it has a config.json" in data.throughput_notes[0]


def test_report_is_redone_when_the_records_change(run, monkeypatch):
    for name in plots.__all__:  # drawing takes seconds
        monkeypatch.setattr(plots, name, lambda *_, **__: b"")
    folder = run / "report"
    text = plain(reporting.rewrite_report(run).read_text())
    assert "vLLM 0.26.0 on NVIDIA H200, 1 to 16k tokens, as many sequences as the memory holds" in text
    assert "two, and 1 more with its layout" in text
    written, num_layers = read_run(run)
    stage = written.stages[-1]
    inputs = json.loads((folder / "manifest.json").read_text())["inputs"]
    artifacts = {name: read_artifact(run / name, may_lack=".safetensors") for name in inputs if name != "serving.jsonl"}

    def created():
        reporting.make_report(stage, written, num_layers, artifacts, run)
        return (folder / "report.html").stat().st_mtime_ns

    first = created()
    assert created() == first, "it stands"
    add_record(run / "serving.jsonl", served_models(run)[0][1], 2000.0)
    second = created()
    assert second > first
    (run / "serving.jsonl").unlink()
    assert created() > second
    assert "vLLM" not in (folder / "report.html").read_text()

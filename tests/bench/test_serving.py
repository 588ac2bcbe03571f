"""Measuring in vLLM: one process a model, records that outlive failures, and sums that are right."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridize.bench import serving, serving_job
from hybridize.bench.prediction import CachePlan
from hybridize.bench.scenarios import SHAPES, Scenario
from hybridize.bench.serving import ServedModel, make_served_config, measure_serving, serving_table
from hybridize.bench.serving_job import Window, append_record, decode_seconds, graph_sizes
from hybridize.pipeline.serving_cost import layout_shape, served_shape
from hybridize.spec.layout import LayoutSpec
from hybridize.spec.mixers import Mamba1Spec, SlidingWindowSpec

SCENARIO = Scenario(1, 96)
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed; pip install hybridize[serve]"
)


def model(name="teacher", word="aaaa"):
    config = SHAPES["pocket"]
    return ServedModel(name, word, config, served_shape(config, word))


def record(name="teacher", word="aaaa", rate=100.0, **more):
    return {
        "model": name,
        "layout": word,
        "scenario": str(SCENARIO),
        "prompt_tokens": 1,
        "new_tokens": 96,
        "method": "sampled",
        "device": "cpu",
        "kv_groups": 2,
        "sequences": 8,
        "capacity_tokens": 12345,
        "step_ms": 3.0,
        "floor_ms": 1.5,
        "tokens_per_second": rate,
    } | more


@pytest.fixture
def processes(monkeypatch):
    """Stand in for the measuring processes: each is noted and leaves a record, unless its model is called `bad`."""
    started = []

    def run(command, *, env, stdout, **_):
        job = json.loads(Path(command[-1]).read_text())
        started.append(job)
        assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        if job["name"] == "bad":
            stdout.write("Traceback:\n  x\ntorch.OutOfMemoryError: too much\n")
            return SimpleNamespace(returncode=1)
        if job["name"] == "slow":
            raise subprocess.TimeoutExpired(command, 1)
        for prompt, new in job["scenarios"]:
            made = record(job["name"], job["word"], prompt_tokens=prompt, new_tokens=new, asked=job["asked"])
            append_record(Path(job["records"]), made)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(serving.subprocess, "run", run)
    monkeypatch.setattr(serving, "_has_vllm", lambda: True)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    return started


def test_failed_models_do_not_stop_the_others_and_are_tried_again(processes, tmp_path):
    models = [model(), model("bad", "amam"), model("slow", "amma"), model("H", "aamm")]
    file = tmp_path / "records.jsonl"
    records = measure_serving(models, [SCENARIO], file)
    assert [r["model"] for r in records] == ["teacher", "bad", "slow", "H"]
    assert records[1]["error"].startswith("torch.OutOfMemoryError: too much")
    assert str(tmp_path / "records.bad.log") in records[1]["error"]
    assert "not ready within" in records[2]["error"]
    text = serving_table(records)
    assert "bad: torch.OutOfMemoryError" in text
    measure_serving(models, [SCENARIO], file)
    assert [job["name"] for job in processes] == ["teacher", "bad", "slow", "H", "bad", "slow"]


def test_what_is_measured_is_not_measured_again(processes, tmp_path):
    file = tmp_path / "records.jsonl"
    measure_serving([model()], [SCENARIO], file)
    with file.open("a") as stream:
        stream.write('{"model": "teach')  # a killed process
    other, told = Scenario(64, 96), []
    records = measure_serving([model()], [SCENARIO, other], file, on_progress=told.append)
    assert told[0].startswith("records.jsonl, line 2: not whole")
    assert [job["scenarios"] for job in processes] == [[[1, 96]], [[64, 96]]]
    assert [r["prompt_tokens"] for r in records] == [1, 64]
    measure_serving([model()], [SCENARIO], file, whole=True)  # another way to measure is another record
    assert len(processes) == 3
    measure_serving([model(word="aaam")], [SCENARIO], file)  # and so is another layout
    assert len(processes) == 4


@pytest.mark.parametrize(
    "options", [{"state_dtype": "bfloat16"}, {"utilization": 0.5}, {"max_sequences": 3}, {"step_tokens": 2048}]
)
def test_other_settings_are_measured_by_themselves(processes, tmp_path, options):
    file = tmp_path / "records.jsonl"
    measure_serving([model()], [SCENARIO], file)
    records = measure_serving([model()], [SCENARIO], file, **options)
    assert len(processes) == 2
    assert [record["asked"] | options for record in records] == [record["asked"] for record in records]
    measure_serving([model()], [SCENARIO], file)
    assert len(processes) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats: 0 is out of range"),
        ({"max_sequences": -1}, "max_sequences: -1 is out of range"),
        ({"step_tokens": 0}, "step_tokens: 0 is out of range"),
        ({"repeats": 90}, "1 -> 96 has 96 new tokens, of which steps cannot be sampled; use at least 101"),
    ],
)
def test_options_out_of_range_are_named(processes, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        measure_serving([model()], [SCENARIO], tmp_path / "records.jsonl", **options)
    assert not processes


def test_missing_vllm_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "_has_vllm", lambda: False)
    with pytest.raises(ImportError, match="pip install 'hybridize\\[serve\\]'"):
        measure_serving([model()], [SCENARIO], tmp_path / "records.jsonl")


def test_table_compares_with_the_teacher_of_the_same_scenario():
    records = [record(rate=100.0), record("H", "amam", 450.0), record(scenario="x", rate=10.0)]
    text = serving_table([*records, record("H", "amam", 20.0, scenario="x")])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| H")]
    assert [row[-1] for row in rows] == ["4.50", "2.00"]
    assert rows[0][4:7] == ["3", "1.5", "2.00"]


def test_records_on_a_known_gpu_say_what_was_predicted():
    made = record(device="NVIDIA H200", memory_bytes=150e9, copy_gb_per_s=4300.0, utilization=0.9)
    predicted = serving._prediction(made, model().shape)["predicted"]
    assert predicted["sequences"] > 1000
    assert predicted["tokens_per_second"] > 0
    smaller_steps = serving._prediction(made | {"step_tokens": 2048}, model().shape)["predicted"]
    assert smaller_steps["sequences"] > predicted["sequences"], "memory is kept free for tokens that no step has"
    assert serving._prediction(record(), model().shape) == {}


def test_folder_of_a_hybrid_is_a_hybrids_config(tmp_path):
    make_served_config(model("H", "amag"), tmp_path / "hybrid")
    config = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    assert [mixer["type"] for mixer in config["mixers"]] == ["attention", "mamba1", "attention", "gated_delta_net"]
    make_served_config(model(), tmp_path / "teacher")
    assert json.loads((tmp_path / "teacher" / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]


def test_folder_of_a_hybrid_has_the_mixers_that_it_was_made_with(tmp_path):
    layout = LayoutSpec.read("amaa", {"m": Mamba1Spec(state_size=32)})
    make_served_config(replace(model("H", "amaa"), layout=layout), tmp_path / "hybrid")
    config = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    assert config["mixers"][1]["state_size"] == 32


def test_models_are_served_beyond_the_length_they_were_made_for(processes, tmp_path, monkeypatch):
    lengths = []

    def note(model, folder, num_tokens):
        make_served_config(model, folder, num_tokens)
        lengths.append(json.loads((folder / "config.json").read_text())["max_position_embeddings"])

    monkeypatch.setattr(serving, "make_served_config", note)
    measure_serving([model(), model("H", "amam")], [Scenario(1, 4096), SCENARIO], tmp_path / "long.jsonl")
    measure_serving([model()], [SCENARIO], tmp_path / "short.jsonl")
    assert lengths == [4098, 4098, 1024]


def test_windows_of_other_lengths_are_measured_by_themselves(processes, tmp_path):
    config, file = SHAPES["pocket"], tmp_path / "records.jsonl"
    for window in (256, 512, 256):
        layout = LayoutSpec.read("asaa", {"s": SlidingWindowSpec(window=window)})
        served = ServedModel("H", "asaa", config, layout_shape(config, layout), layout)
        measure_serving([served], [SCENARIO], file)
    assert [job["asked"]["windows"] for job in processes] == [[None, 256, None, None], [None, 512, None, None]]


def test_steps_are_summed_up_as_a_line_through_the_points():
    scenario = Scenario(1, 1000)
    line = [Window(context, 2.0 + 0.01 * context) for context in (20.0, 500.0, 980.0)]
    exact = sum(2.0 + 0.01 * context for context in range(1, 1001)) / 1e3
    assert decode_seconds(scenario, line) == pytest.approx(exact, rel=1e-3)
    assert decode_seconds(scenario, line[:1]) == pytest.approx(1000 * line[0].step_ms / 1e3)
    bent = [Window(0.0, 1.0), Window(501.0, 1.0), Window(1001.0, 3.0)]
    assert decode_seconds(scenario, bent) == pytest.approx((500 * 1.0 + 500 * 2.0) / 1e3)


def test_first_token_of_a_long_prompt_comes_with_it():
    assert decode_seconds(Scenario(64, 1000), [Window(100.0, 1.0)]) == pytest.approx(0.999)
    assert decode_seconds(Scenario(1, 1000), [Window(100.0, 1.0)]) == pytest.approx(1.0)


@pytest.mark.parametrize("most", [1, 2, 5, 33, 158, 700])
def test_graphs_are_made_for_crowds_near_the_largest(most):
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert sizes[0] > 0
    for crowd in range(math.ceil(0.85 * most), most + 1):
        padded = next(size for size in sizes if size >= crowd)
        assert padded - crowd <= max(0, most // 16)
    assert len(sizes) <= 8


def test_steps_without_the_whole_crowd_are_refused():
    steps = [SimpleNamespace(seconds=i, requests=r, tokens=t) for i, (r, t) in enumerate([(2, 9), (4, 4), (4, 4)])]
    assert [step.seconds for step in serving_job._crowd_steps(steps, 4)] == [1, 2]
    with pytest.raises(RuntimeError, match="did not run 8 sequences together"):
        serving_job._crowd_steps(steps, 8)
    with pytest.raises(RuntimeError, match="did not run 4 sequences together"):
        serving_job._crowd_steps([*steps, steps[0], steps[1]], 4)  # one was preempted on the way


def test_command_measures_what_it_is_asked_and_shows_a_table(processes, tmp_path, monkeypatch, capsys):
    from hybridize import cli

    out = tmp_path / "serving.jsonl"
    words = ["--small", "--out", str(out), "--layout", "H=am*2", "--layout", "bad=amma", "--scenario", "1:96"]
    monkeypatch.setattr(sys, "argv", ["hybridize", "bench", "serve", *words, "--only", "H", "--only", "teacher"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert [(job["name"], job["word"]) for job in processes] == [("H", "amam"), ("teacher", "aaaa")]
    assert "| H | 2 | 8 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["hybridize", "bench", "serve", *words, "--only", "bad"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    shown = capsys.readouterr()
    assert "bad: torch.OutOfMemoryError: too much" in shown.out
    assert "| H | 2 | 8 |" in shown.out
    assert len(processes) == 3


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm_is_measured_as_predicted_in_layout(tmp_path):
    models = [model("H", "amgm"), model()]
    scenarios = [Scenario(1, 64), Scenario(140, 64)]
    options = {"repeats": 2, "steps": 4, "max_sequences": 5, "step_tokens": 320}
    records = measure_serving(models, scenarios, tmp_path / "sampled.jsonl", **options)
    assert [r.get("error") for r in records] == [None] * 4
    for made, (served, scenario) in zip(records, [(m, s) for m in models for s in scenarios], strict=True):
        plan = CachePlan.of(served.shape, alignment=128)  # of vLLM's attention on a CPU
        assert made["kv_groups"] == plan.groups
        assert made["page_bytes"] == plan.page_bytes
        assert made["blocks_per_sequence"] == plan.blocks(scenario.tokens)
        assert made["sequences"] == 5
        assert (made["step_tokens"], made["model_runner"]) == (320, 1)
        assert [len(point) for point in made["points"]] == [2, 2, 2]
        contexts = [window["context"] for point in made["points"] for window in point]
        assert contexts == sorted(contexts)
        assert scenario.prompt_tokens < contexts[0]
        assert contexts[-1] <= scenario.tokens
        assert all(window["step_ms"] > 0 for point in made["points"] for window in point)
    (whole,) = measure_serving(models[:1], scenarios[:1], tmp_path / "whole.jsonl", whole=True, **options)
    assert whole["tokens_per_second"] == pytest.approx(5 * 64 / sorted(whole["seconds"])[0], rel=0.5)


def test_parent_imports_no_vllm():
    code = "import sys; import hybridize.bench.serving, hybridize.cli.benching; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

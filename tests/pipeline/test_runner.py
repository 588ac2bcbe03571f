"""A recipe runs to its report, skips what stands, notices damage, and survives being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hybridize.data.world import draw_problem
from hybridize.pipeline.collecting import collect
from hybridize.pipeline.job import to_dtype
from hybridize.pipeline.progress import Reporter
from hybridize.pipeline.reporting import rewrite_report
from hybridize.pipeline.runner import _check_files, run_recipe
from hybridize.pipeline.stages import spec_for_key
from hybridize.report import console_summary
from hybridize.spec.recipe import parse_recipe
from hybridize.spec.stages import DistillStage

QUIET = Reporter(quiet=True)


def weights(run: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(run / "distill" / "model.safetensors")


def test_run_makes_every_artifact_and_a_loadable_model(tiny_recipe):
    artifacts = run_recipe(parse_recipe(tiny_recipe), QUIET)
    run = Path(tiny_recipe["output"])
    assert list(artifacts) == ["rank", "convert", "distill", "judge-teacher", "judge", "report"]
    assert (run / "report" / "report.html").stat().st_size > 10_000
    assert not list(run.glob(".*")), "no partial folder may be left"
    assert not (run / "distill" / "checkpoints").exists()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hybridize  # noqa: F401 - registers the hybrid with the Auto classes

    model = AutoModelForCausalLM.from_pretrained(run / "distill")
    assert model.config.layout.replaced == tuple(artifacts["convert"].metrics["layers"])
    assert AutoTokenizer.from_pretrained(run / "distill").chat_template


def test_run_again_skips_all_and_a_changed_stage_reruns_only_what_depends_on_it(tiny_recipe):
    first = run_recipe(parse_recipe(tiny_recipe), QUIET)
    again = run_recipe(parse_recipe(tiny_recipe), QUIET)
    assert {n: a.manifest for n, a in first.items()} == {n: a.manifest for n, a in again.items()}
    tiny_recipe["stages"][2]["learning_rate"] = 5e-4
    changed = run_recipe(parse_recipe(tiny_recipe), QUIET)
    same = {
        n
        for n in first
        if first[n].manifest["created"] == changed[n].manifest["created"]
        and first[n].manifest["key"] == changed[n].manifest["key"]
    }
    assert same == {"rank", "convert", "judge-teacher"}


def test_report_written_anew_stands_in_the_next_run(tiny_recipe):
    run_recipe(parse_recipe(tiny_recipe), QUIET)
    run = Path(tiny_recipe["output"])
    assert rewrite_report(run) == run / "report" / "report.html"
    created = {p: p.stat().st_mtime_ns for p in (run / "report").iterdir()}
    run_recipe(parse_recipe(tiny_recipe), QUIET)
    assert {p: p.stat().st_mtime_ns for p in (run / "report").iterdir()} == created


def test_report_of_a_run_that_has_just_begun(tiny_recipe):
    tiny_recipe["stages"] = tiny_recipe["stages"][:1]
    recipe = parse_recipe(tiny_recipe)
    artifacts = run_recipe(recipe, QUIET)
    assert rewrite_report(Path(tiny_recipe["output"])).is_file()
    console_summary(collect(recipe, 4, artifacts))  # what the command prints in the end


def test_report_leaves_out_what_older_settings_made(tiny_recipe):
    run_recipe(parse_recipe(tiny_recipe), QUIET)
    run = Path(tiny_recipe["output"])
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["recipe"]["stages"][2]["learning_rate"] = (
        5e-4  # as if the changed recipe had been killed in its second stage
    )
    (run / "recipe.json").write_text(json.dumps(recipe))
    rewrite_report(run)
    inputs = json.loads((run / "report" / "manifest.json").read_text())["inputs"]
    assert sorted(inputs) == ["convert", "judge-teacher", "rank"]


def test_report_calls_stale_what_the_next_run_would_make_anew(tiny_recipe, tmp_path):
    data, teacher = tmp_path / "chats.jsonl", shutil.copytree(tiny_recipe["teacher"], tmp_path / "teacher")
    problems = [draw_problem("addition", 1, "train", i) for i in range(31)]
    rows = [json.dumps({"messages": problem.messages}) + "\n" for problem in problems]
    data.write_text("".join(rows[:-1]))
    tiny_recipe["stages"][1] = {"kind": "convert", "layers": [1]}
    tiny_recipe["stages"][2]["steps"] = 1
    tiny_recipe |= {"teacher": str(teacher), "data": {"source": "file", "path": str(data)}}
    del tiny_recipe["stages"][0]
    run = Path(tiny_recipe["output"])

    def page():
        return " ".join(rewrite_report(run).read_text().split())

    before = run_recipe(parse_recipe(tiny_recipe), QUIET)
    assert "Stale:" not in page()
    data.write_text("".join(rows))
    html = page()
    assert "Stale: distill (its data changed), judge (made from distill). These stages are shown as last made" in html
    assert html.count("<td>stale</td>") == 2
    assert html.count("<td>done</td>") == 2
    after = run_recipe(parse_recipe(tiny_recipe), QUIET)
    anew = {name for name in before if before[name].manifest["key"] != after[name].manifest["key"]}
    assert anew == {"distill", "judge", "report"}
    assert "Stale:" not in (run / "report" / "report.html").read_text()
    data.unlink()
    assert "Stale:" not in page(), "what is gone cannot be compared"
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"bos_token_id": 5}))
    assert "judge-teacher (the teacher changed), judge (the teacher changed, made from distill)." in page()
    shutil.rmtree(teacher)
    assert "Stale:" not in page()


def test_report_names_a_damaged_recipe(tmp_path):
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe\.json: it is damaged.*run the recipe again"):
        rewrite_report(tmp_path)


def test_smaller_batches_do_not_cost_the_work_done():
    stages = [{"rows_per_batch": 2}, {"gradient_checkpointing": True, "save_every": 3}, {}]
    specs = [DistillStage(name="d", model="m", steps=1, tokens_per_step=64, sequence_length=32, **s) for s in stages]
    assert spec_for_key(specs[0]) == spec_for_key(specs[1]) == spec_for_key(specs[2])


@pytest.mark.parametrize("tied", [True, False])
def test_to_dtype_keeps_ties_and_what_a_mixer_needs_in_fp32(tiny_teacher, tied):
    import torch

    from hybridize.models import load_teacher
    from hybridize.spec.layout import LayoutSpec
    from hybridize.spec.mixers import Mamba1Spec
    from hybridize.transfer import convert

    teacher = load_teacher(tiny_teacher)
    if tied:
        teacher.config.tie_word_embeddings = True
        teacher.tie_weights()
    hybrid, _ = convert(teacher, LayoutSpec.replace(4, [1], Mamba1Spec()))
    to_dtype(hybrid, torch.bfloat16)
    kept = {name.rpartition("mixer.")[2] for name, p in hybrid.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_proj.bias"}
    assert (hybrid.lm_head.weight is hybrid.model.embed_tokens.weight) == tied


def test_run_names_a_truncated_artifact(tiny_recipe):
    run_recipe(parse_recipe(tiny_recipe), QUIET)
    file = Path(tiny_recipe["output"]) / "convert" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"convert/model\.safetensors: was truncated or edited.*remove"):
        run_recipe(parse_recipe(tiny_recipe), QUIET)


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_where_the_undisturbed_one_does(tiny_recipe, tmp_path):
    undisturbed = dict(tiny_recipe, output=str(tmp_path / "undisturbed"))
    run_recipe(parse_recipe(undisturbed), QUIET)
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe))
    run = Path(tiny_recipe["output"])
    marks = [  # kill as soon as each of these is there: within ranking, within distillation, after it
        ".rank.partial/layers/layer-1.json",
        ".distill.partial/checkpoints/checkpoint-2",
        ".judge.partial",
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    for mark in marks:
        command = [sys.executable, "-c", "from hybridize.cli import main; main()", "run", str(recipe)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (run / mark).exists() and process.poll() is None:
            assert time.monotonic() < deadline, f"{mark} never appeared"
            time.sleep(0.005)
        assert process.poll() is None, (mark, process.stderr.read().decode())
        process.send_signal(signal.SIGKILL)
        process.communicate()
    artifacts = run_recipe(parse_recipe(tiny_recipe), QUIET)
    assert artifacts["distill"].metrics["steps"] == 6
    killed, whole = weights(run), weights(tmp_path / "undisturbed")
    assert killed.keys() == whole.keys()
    assert all((killed[name] == whole[name]).all() for name in whole)
    metrics = (run / "distill" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r["stages"][1].update(num_layers=5),
            r"recipe\.stages\[1\]\.num_layers: 5 is out of range.*1\.\.4",
        ),
        (
            lambda r: r["stages"].__setitem__(1, {"kind": "convert", "layout": "aam"}),
            r"recipe\.stages\[1\]\.layout: it has 3 layers, but the teacher has 4; give one letter or mixer a layer",
        ),
        (lambda r: r.update(teacher="/nowhere/at-all"), r"teacher: there is no folder /nowhere/at-all"),
        (
            lambda r: r.update(data={"source": "file", "path": "/nowhere.jsonl"}),
            r"data\.path: there is no file",
        ),
    ],
)
def test_run_refuses_what_does_not_fit_before_doing_anything(tiny_recipe, change, message):
    change(tiny_recipe)
    with pytest.raises(ValueError, match=message):
        run_recipe(parse_recipe(tiny_recipe), QUIET)
    assert not (Path(tiny_recipe["output"]) / "rank").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "?"}\n', r"distill\.data: .*a\.jsonl:1: .*completion"),
        ("a.jsonl", "Apache License\n", r"distill\.data: .*a\.jsonl:1: 'Apache License' is not JSON"),
        ("a.txt", " \n", r"distill\.data: .*a\.txt: it holds no text"),
    ],
)
def test_run_reads_the_start_of_each_file_before_doing_anything(tiny_recipe, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    tiny_recipe["stages"][2]["data"] = {"source": "file", "path": str(tmp_path / name)}
    with pytest.raises(ValueError, match=message):
        run_recipe(parse_recipe(tiny_recipe), QUIET)
    assert not Path(tiny_recipe["output"]).exists()


def test_prompts_without_answers_are_enough_where_answers_are_made(tiny_recipe, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "?"}\n')
    data = {"source": "file", "path": str(tmp_path / "a.jsonl")}
    traces = {"kind": "traces", "num_prompts": 1}
    _check_files(parse_recipe({"name": "n", "teacher": "t", "stages": [traces | {"data": data}]}))
    chosen = [{"kind": "rank", "method": "uniform"}, traces]
    _check_files(parse_recipe({"name": "n", "teacher": "t", "data": data, "stages": chosen}))


def test_run_refuses_an_explicit_layer_out_of_range(tiny_recipe):
    tiny_recipe["stages"][1] = {"kind": "convert", "layers": [1, 24]}
    with pytest.raises(ValueError, match=r"recipe\.stages\[1\]\.layers\[1\]: the teacher has no layer 24.*0\.\.3"):
        run_recipe(parse_recipe(tiny_recipe), QUIET)


def test_run_leaves_alone_what_no_stage_made_and_says_so_first(tiny_recipe):
    mine = Path(tiny_recipe["output"]) / "convert" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(ValueError, match=r"convert: it has no manifest\.json.*left alone"):
        run_recipe(parse_recipe(tiny_recipe), QUIET)
    assert [p for p in Path(tiny_recipe["output"]).rglob("*") if p.is_file()] == [mine]


def test_a_layout_of_all_kinds_runs_like_any_other(tiny_recipe):
    tiny_recipe["stages"][1] = {
        "kind": "convert",
        "layout": "a2xg",
        "blocks": {"x": {"type": "sliding_window", "window": 8, "sink": True}},
        "init": "neutral",
    }
    artifacts = run_recipe(parse_recipe(tiny_recipe), QUIET)
    layout = ["attention", "mamba2", "sliding_window", "gated_delta_net"]
    assert artifacts["convert"].metrics["layout"] == layout
    assert artifacts["convert"].metrics["layers"] == [1, 2, 3]
    assert artifacts["distill"].metrics["steps"] == 6

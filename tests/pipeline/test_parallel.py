"""Stages side by side make what they make in a row; one that fails, is killed or interrupted harms no other."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

from hybridize.pipeline.artifacts import read_artifact
from hybridize.pipeline.parallel import _Crew, _Plan
from hybridize.pipeline.progress import Reporter
from hybridize.pipeline.runner import run_recipe
from hybridize.pipeline.worker import Failed, _threads_for
from hybridize.spec.base import StoppedError
from hybridize.spec.recipe import parse_recipe
from hybridize.spec.stages import ConvertStage, EvaluateStage, ReportStage, ThroughputStage

QUIET = Reporter(quiet=True)


@pytest.fixture
def branches(tiny_recipe):
    """Two conversions of one teacher, each distilled, one judged; speed and report at the end."""
    distill = tiny_recipe["stages"][2] | {"steps": 3, "save_every": 1}
    tiny_recipe["stages"] = [
        {"name": "left", "kind": "convert", "layers": [1]},
        {"name": "right", "kind": "convert", "layers": [2, 3], "mixer": "gated_delta_net", "init": "random", "seed": 3},
        distill | {"name": "distill-left", "model": "left"},
        distill | {"name": "distill-right", "model": "right", "seed": 5},
        {"kind": "merge", "sources": ["distill-left", "left"], "method": "linear"},
        {"kind": "throughput", "model": "merge", "batch_size": 2, "new_tokens": 4, "repeats": 1},
        {"name": "judge", "kind": "evaluate", "model": "distill-right", "level": 1, "problems_per_task": 1},
        {"kind": "report"},
    ]
    return tiny_recipe


def command(recipe: Path, jobs: int) -> list[str]:
    return [sys.executable, "-c", "from hybridize.cli import main; main()", "run", str(recipe), "--jobs", str(jobs)]


def start(recipe: dict, folder: Path, jobs: int = 2) -> subprocess.Popen:
    """The command in a session of its own, so that Ctrl-C reaches it and its workers only.

    It listens to Ctrl-C even where the tests run in the background, whose processes ignore it.
    """

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(file, jobs), env=environment, start_new_session=True, preexec_fn=listen, **streams)


def wait_for_step(training: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until a training has a checkpoint of a step or of a later one: old ones are removed."""
    deadline = time.monotonic() + 120
    while not any(int(mark.name.split("-")[1]) >= step for mark in training.glob("checkpoints/checkpoint-*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"{training} has no checkpoint of step {step}"
        time.sleep(0.005)


def members(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def wait_for_the_last(process: subprocess.Popen) -> None:
    """Until no process of the session lives: Python's own helper for semaphores outlives the command by a moment."""
    deadline = time.monotonic() + 15
    while members(process.pid):
        assert time.monotonic() < deadline, members(process.pid)
        time.sleep(0.05)


def weights(run: Path, stage: str) -> dict:
    from safetensors.torch import load_file

    return load_file(run / stage / "model.safetensors")


@pytest.mark.slow
def test_side_by_side_makes_what_a_row_makes(branches, tmp_path):
    in_a_row = branches | {"output": str(tmp_path / "row")}
    row = run_recipe(parse_recipe(in_a_row), QUIET)
    said = Console(file=(tmp_path / "said").open("w"), width=200, force_terminal=False)
    beside = run_recipe(parse_recipe(branches), Reporter(said), jobs=3)
    assert list(beside) == list(row)
    run = Path(branches["output"])
    for stage in ("left", "right", "distill-left", "distill-right", "merge"):
        one, other = weights(tmp_path / "row", stage), weights(run, stage)
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one), stage
    for name in row:
        assert row[name].manifest["spec"] == beside[name].manifest["spec"]
        assert row[name].manifest["files"].keys() == beside[name].manifest["files"].keys()
    assert row["judge"].metrics["overall"] == beside["judge"].metrics["overall"]
    losses = [
        [json.loads(line)["loss_nats"] for line in (folder / "distill-left" / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "row")
    ]
    assert losses[0] == losses[1]
    assert not list(run.glob(".*")), "neither locks nor partial folders are left"
    said.file.close()
    lines = (tmp_path / "said").read_text().splitlines()
    assert any(line.startswith("  distill-left: loss ") for line in lines)
    assert any(line.startswith("  judge: ") and " right, " in line for line in lines)
    assert sum(line.startswith(("1/8 left", "8/8 report")) for line in lines) == 2
    # In a row after that, and side by side once more, all of it stands.
    for jobs in (1, 2):
        again = run_recipe(parse_recipe(branches), QUIET, jobs=jobs)
        assert {name: a.manifest for name, a in again.items()} == {name: a.manifest for name, a in beside.items()}


@pytest.mark.slow
def test_a_stage_that_fails_stops_only_what_needs_it(branches, tmp_path):
    short = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "?" * 900}, {"role": "assistant", "content": "!" * 900}]}
    short.write_text(json.dumps(chat) + "\n")
    distill = branches["stages"][2]
    broken = distill | {"data": {"source": "file", "path": str(short)}}
    branches["stages"][2] = broken
    with pytest.raises(
        ValueError, match=r"distill-left: sequence_length 256: all 1 conversations.*\n.*: merge, throughput$"
    ):
        run_recipe(parse_recipe(branches), QUIET, jobs=2)
    run = Path(branches["output"])
    done = {folder.name for folder in run.iterdir() if read_artifact(folder) is not None}
    assert done == {"left", "right", "distill-right", "judge", "report"}
    page = (run / "report" / "report.html").read_text()
    assert "distill-right" in page
    assert not list(run.glob(".*"))
    before = read_artifact(run / "distill-right").manifest
    branches["stages"][2] = distill
    after = run_recipe(parse_recipe(branches), QUIET)
    assert len(after) == 8
    assert after["distill-right"].manifest == before


@pytest.mark.slow
def test_a_killed_worker_costs_its_own_stage_only_and_the_next_run_goes_on(branches, tmp_path):
    branches["stages"][2]["steps"] = 16
    run = Path(branches["output"])
    process = start(branches, tmp_path)
    wait_for_step(run / ".distill-left.partial", 3, process)
    os.kill(json.loads((run / ".distill-left.lock").read_text())["process"], signal.SIGKILL)
    out, error = process.communicate(timeout=200)
    assert process.returncode == 1, (out, error)
    assert "distill-left: its process was ended by SIGKILL, perhaps for lack of memory" in error.replace("\n", " ")
    wait_for_the_last(process)
    done = {folder.name for folder in run.iterdir() if folder.is_dir() and read_artifact(folder) is not None}
    assert done == {"left", "right", "distill-right", "judge", "report"}
    artifacts = run_recipe(parse_recipe(branches), QUIET)
    assert artifacts["distill-left"].metrics["steps"] == 16
    whole = run_recipe(parse_recipe(branches | {"output": str(tmp_path / "row")}), QUIET)
    one, other = weights(run, "distill-left"), weights(tmp_path / "row", "distill-left")
    assert all((one[name] == other[name]).all() for name in one)
    assert whole.keys() == artifacts.keys()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "killed"])
def test_the_end_of_a_run_is_the_end_of_all_its_processes(branches, tmp_path, how):
    for stage in branches["stages"][2:4]:
        stage["steps"] = 400
    run = Path(branches["output"])
    process = start(branches, tmp_path)
    for name in ("left", "right"):
        wait_for_step(run / f".distill-{name}.partial", 2, process)
    assert len(members(process.pid)) >= 3
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, error = process.communicate(timeout=60)
    wait_for_the_last(process)
    if how == "Ctrl-C":
        assert process.returncode == 130
        assert "interrupted; the same command goes on" in error
        assert "Traceback" not in error
    assert not (run / "distill-left").exists()
    for stage in branches["stages"][2:4]:  # a shorter one cannot go on, but nothing is in its way
        stage["steps"] = 2
    assert len(run_recipe(parse_recipe(branches), QUIET)) == 8


def artifact(name):
    return SimpleNamespace(name=name)


def drive(stages, jobs, failing=()):
    """The order in which stages would begin and end, the first begun ending first."""
    plan, busy, order = _Plan(tuple(stages)), {}, []
    while True:
        while (stage := plan.next(busy, jobs)) is not None:
            plan.started.add(stage.name)
            order.append(f"+{stage.name}")
            busy[stage.name] = stage
        if not busy:
            return plan, order
        name = next(iter(busy))
        ended = busy.pop(name)
        if name in failing:
            plan.fail(ended, Failed("stop", f"{name} broke"), SimpleNamespace(say=lambda *_: None))
        else:
            plan.finished[name] = artifact(name)
            order.append(f"-{name}")


def a_study():
    return [
        ConvertStage(name="a", layers=(1,)),
        ThroughputStage(name="speed-a", model="a"),
        ConvertStage(name="b", layers=(2,)),
        EvaluateStage(name="judge-a", model="a"),
        EvaluateStage(name="judge-b", model="b"),
        ReportStage(name="report"),
    ]


def test_speed_is_measured_alone_and_last():
    _, order = drive(a_study(), 3)
    at = order.index("+speed-a")
    assert order[at : at + 2] == ["+speed-a", "-speed-a"]
    assert order[at - 1] == "-judge-b"
    assert order[-2:] == ["+report", "-report"]


@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_no_more_stages_are_under_way_than_there_are_jobs(jobs):
    plan, order = drive(a_study(), jobs)
    under_way = most = 0
    for event in order:
        under_way += 1 if event[0] == "+" else -1
        most = max(most, under_way)
    assert most == min(jobs, 2)
    assert len(plan.finished) == 6
    for stage in plan.stages:
        for name in stage.inputs:
            assert order.index(f"-{name}") < order.index(f"+{stage.name}")


@pytest.fixture
def crew(monkeypatch):
    """A crew whose processes do nothing; each records the GPUs that it would see."""

    class Context:
        Pipe = staticmethod(lambda: (SimpleNamespace(send=lambda task: None), SimpleNamespace(close=lambda: None)))

        @staticmethod
        def Process(target, args, daemon):
            process = SimpleNamespace()
            process.start = lambda: setattr(process, "sees", os.environ.get("CUDA_VISIBLE_DEVICES"))
            return process

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("hybridize.pipeline.parallel.get_context", lambda kind: Context)

    def make(*gpus: str) -> _Crew:
        monkeypatch.setattr("hybridize.pipeline.parallel.gpu_names", lambda: gpus)
        return _Crew(run=None, jobs=5)

    return make


def test_gpus_are_dealt_out_among_processes(crew):
    two = crew("0", "GPU-b")
    for stage in "abc":
        two.give(stage, None)
    assert [worker.process.sees for worker in two.workers] == ["0", "GPU-b", "0"]
    two.workers.pop(0)  # it was killed
    two.give("d", None)
    two.give("e", None)
    assert sorted(worker.process.sees for worker in two.workers) == ["0", "0", "GPU-b", "GPU-b"]
    for gpus in ((), ("3",)):
        one = crew(*gpus)
        one.give("a", None)
        assert one.workers[0].process.sees is None, "what this process sees"


def test_a_stage_goes_to_the_gpu_with_less_to_do(crew):
    two = crew("0", "1")
    for stage in "abcd":
        two.give(stage, None)
    first, second, third, fourth = two.workers
    first.stage = second.stage = fourth.stage = None  # GPU 0 does one thing yet, GPU 1 nothing
    two.give("e", None)
    assert (first.stage, third.stage) == (None, "c")
    assert {second.stage, fourth.stage} == {"e", None}


def test_a_process_is_not_used_again_after_a_fault(crew):
    one = crew()
    one.give("a", None)
    mine, its = Pipe()
    ended = []
    process = SimpleNamespace(terminate=lambda: ended.append(True), join=lambda *_: None, exitcode=0)
    one.workers[0].pipe, one.workers[0].process = mine, process
    its.send(Failed("stop", "no memory"))
    assert one.hear() == [("a", Failed("stop", "no memory"))]
    one.give("b", None)
    assert len(one.workers) == 1, "it goes on after a stop"
    its.send(Failed("fault", "CUDA error: an illegal memory access"))
    assert one.hear() == [("b", Failed("fault", "CUDA error: an illegal memory access"))]
    assert ended == [True]
    assert one.workers == []


def test_what_failed_is_told_with_what_could_not_be_done():
    plan, order = drive(a_study(), 2, failing=("a",))
    assert "+judge-b" in order
    assert order[-1] == "-report", "about the others"
    with pytest.raises(StoppedError, match=r"^a: a broke\nnot done, since they need what failed: speed-a, judge-a$"):
        plan.check()
    plan, _ = drive(a_study()[:1], 2, failing=("a",))
    with pytest.raises(StoppedError, match=r"^a broke$"):
        plan.check()
    plan, _ = drive(a_study()[:1], 2)
    plan.check()


def test_a_number_of_jobs_below_one_is_refused(branches):
    with pytest.raises(ValueError, match=r"^jobs: 0 is out of range; use 1 or more$"):
        run_recipe(parse_recipe(branches), QUIET, jobs=0)


def test_a_damaged_result_is_named_and_harms_no_other(branches):
    del branches["stages"][2:]
    run = Path(branches["output"])
    run_recipe(parse_recipe(branches), QUIET)
    file = run / "left" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"left/model\.safetensors: was truncated or edited.*remove"):
        run_recipe(parse_recipe(branches), QUIET, jobs=2)
    assert read_artifact(run / "right") is not None


def test_speed_is_measured_with_all_threads_and_the_rest_is_not():
    stages = ThroughputStage(name="speed", model="teacher"), ReportStage(name="report")
    run = SimpleNamespace(all_threads=torch.get_num_threads() + 1)
    seen = []
    for stage in stages:
        with _threads_for(stage, run):
            seen.append(torch.get_num_threads())
    assert seen == [run.all_threads, run.all_threads - 1]
    assert torch.get_num_threads() == run.all_threads - 1

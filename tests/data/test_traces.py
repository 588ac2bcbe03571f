"""Traces: only verified answers, in order, with their provenance; killed anywhere, the same bytes in the end."""

import os
import signal
import sys
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer
from vllm_example import FakeVllm

from hybridize.data.packing import pack_rows
from hybridize.data.sources import Prompt, iter_conversations, read_prompts
from hybridize.data.traces import SCHEMA, make_traces
from hybridize.data.world import draw_problem, judge
from hybridize.models import load_teacher
from hybridize.spec.base import StoppedError
from hybridize.spec.data import FileDataSpec, WorldDataSpec
from hybridize.spec.stages import TracesStage

TEACHER = Path(__file__).parents[2] / "models" / "pocket-teacher"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tiny_teacher):
    """A random model that many tokens stop."""
    model = load_teacher(tiny_teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(100, 180)]
    return model, tokenizer


@pytest.fixture
def stage(tmp_path):
    """Keeps answers of an odd length."""
    path = tmp_path / "odd.py"
    path.write_text("def odd(prompt, answer, reference):\n    return len(answer) % 2 == 1\n")
    return TracesStage(
        name="traces", samples_per_prompt=2, max_new_tokens=8, batch_size=5, verifier=f"{path}:odd", temperature=1.0
    )


@pytest.fixture
def prompts():
    texts = ["what?", "a longer question it is", "why " * 9, "x", "how many?", "and " * 20, "who?"]
    return [
        Prompt([{"role": "user", "content": text}], None if i % 2 else str(i), f"id{i}", f"file:{i}")
        for i, text in enumerate(texts)
    ]


class Counting:
    """A model that counts its batches, and fails at one of them."""

    def __init__(self, model, fail_at=None):
        self._model, self.calls, self._fail_at = model, 0, fail_at

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, **options):
        if options["past_key_values"].get_seq_length() == 0:  # else it goes on with a batch
            if self.calls == self._fail_at:
                raise KeyboardInterrupt
            self.calls += 1
        return self._model.generate(**options)


def test_only_verified_answers_are_kept_in_order_with_provenance(tiny, stage, prompts, tmp_path):
    progress = []
    everything = make_traces(*tiny, stage.model_copy(update={"verifier": "none"}), prompts, tmp_path / "all")
    stats = make_traces(*tiny, stage, prompts, tmp_path / "odd", lambda *done: progress.append(done), model_name="tiny")
    assert progress == [(5, 14), (10, 14), (14, 14)]
    table = pq.read_table(tmp_path / "odd" / "traces.parquet")
    assert table.schema.equals(SCHEMA)
    rows, all_rows = table.to_pylist(), pq.read_table(tmp_path / "all" / "traces.parquet").to_pylist()
    kept = {(row["id"], row["sample"]) for row in all_rows}
    assert [(row["id"], row["sample"]) for row in all_rows] == [
        (p.id, s) for p in prompts for s in range(2) if (p.id, s) in kept
    ]
    assert all(row["completion"].strip() for row in all_rows)
    assert 10 <= len(all_rows) == everything["verified"]  # what is missing has no words
    assert {row["ended"] for row in all_rows} == {True, False}
    expected = [row for row in all_rows if row["ended"] and len(row["completion"]) % 2]
    assert 0 < len(expected) < len(all_rows)
    provenance = {"model": "tiny", "verifier": stage.verifier}
    assert rows == [row | provenance for row in expected]
    by_id = {prompt.id: prompt for prompt in prompts}
    for row in rows:
        prompt = by_id[row["id"]]
        assert row["messages"] == [*prompt.messages, {"role": "assistant", "content": row["completion"]}]
        assert (row["prompt"], row["answer"]) == (prompt.text, prompt.answer)
        assert (row["temperature"], row["top_p"], row["seed"], row["engine"]) == (1.0, 0.95, 0, "transformers")
    assert stats == {
        "prompts": 7,
        "samples": 14,
        "verified": len(rows),
        "pass_rate": len(rows) / 14,
        "truncated": sum(not row["ended"] for row in all_rows),
        "tokens": sum(row["tokens"] for row in all_rows),
        "verified_tokens": sum(row["tokens"] for row in rows),
        "solved_prompts": len({row["id"] for row in rows}),
    }
    assert everything["tokens"] == stats["tokens"]


def test_a_failure_at_any_batch_costs_nothing_but_that_batch(tiny, stage, prompts, tmp_path):
    stats = make_traces(*tiny, stage, prompts, tmp_path / "whole")
    whole = (tmp_path / "whole" / "traces.parquet").read_bytes()
    for fail_at in range(3):
        model = Counting(tiny[0], fail_at)
        with pytest.raises(KeyboardInterrupt):
            make_traces(model, tiny[1], stage, prompts, tmp_path / str(fail_at))
        assert not (tmp_path / str(fail_at) / "traces.parquet").exists()
        model = Counting(tiny[0])
        assert make_traces(model, tiny[1], stage, prompts, tmp_path / str(fail_at)) == stats
        assert model.calls == 3 - fail_at
        assert (tmp_path / str(fail_at) / "traces.parquet").read_bytes() == whole


def run_killed_at(event, work):
    """Do work in a process of its own that is killed at the given write to the disk; whether it was."""
    child = os.fork()
    if not child:
        try:
            seen = 0

            def counted(function):
                def call(*args, **options):
                    nonlocal seen
                    if seen == event:
                        os.kill(os.getpid(), signal.SIGKILL)
                    seen += 1
                    return function(*args, **options)

                return call

            os.fsync = counted(os.fsync)
            Path.replace = counted(Path.replace)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_write_it_ends_with_the_same_bytes(tiny, stage, prompts, tmp_path):
    make_traces(*tiny, stage, prompts, tmp_path / "whole")
    whole = (tmp_path / "whole" / "traces.parquet").read_bytes()
    num_events = 0
    while run_killed_at(num_events, lambda n=num_events: make_traces(*tiny, stage, prompts, tmp_path / str(n))):
        folder = tmp_path / str(num_events)
        assert not (folder / "traces.parquet").exists()
        made = len(list((folder / "parts").glob("[0-9]*.parquet")))
        model = Counting(tiny[0])
        make_traces(model, tiny[1], stage, prompts, folder)
        assert model.calls == 3 - made
        assert (folder / "traces.parquet").read_bytes() == whole
        assert sorted(file.name for file in folder.iterdir()) == ["parts", "traces.parquet"]
        num_events += 1
    assert num_events == 2 * (1 + 3 + 1)  # to the disk and renamed: the plan, each part, the traces


def test_a_damaged_part_is_made_again(tiny, stage, prompts, tmp_path):
    make_traces(*tiny, stage, prompts, tmp_path)
    whole = (tmp_path / "traces.parquet").read_bytes()
    part = sorted((tmp_path / "parts").glob("*.parquet"))[1]
    part.write_bytes(part.read_bytes()[:100])
    model = Counting(tiny[0])
    make_traces(model, tiny[1], stage, prompts, tmp_path)
    assert model.calls == 1
    assert (tmp_path / "traces.parquet").read_bytes() == whole


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0.9}, {"batch_size": 4}, {"max_new_tokens": 9}])
def test_parts_of_other_settings_are_not_gone_on_from(change, tiny, stage, prompts, tmp_path):
    make_traces(*tiny, stage, prompts, tmp_path)
    with pytest.raises(
        ValueError, match="parts: its parts were made with other prompts or settings; remove the folder"
    ):
        make_traces(*tiny, stage.model_copy(update=change), prompts, tmp_path)
    with pytest.raises(ValueError, match="other prompts or settings"):
        make_traces(*tiny, stage, prompts[:-1], tmp_path)


def test_many_windows_keep_the_order(tiny, stage, prompts, tmp_path, monkeypatch):
    stage = stage.model_copy(update={"verifier": "none"})
    make_traces(*tiny, stage, prompts, tmp_path / "one")
    monkeypatch.setattr("hybridize.data.traces._WINDOW_BATCHES", 1)
    make_traces(*tiny, stage, prompts, tmp_path / "many")
    one, many = (pq.ParquetFile(tmp_path / name / "traces.parquet") for name in ("one", "many"))
    assert one.read().equals(many.read())
    assert (one.num_row_groups, many.num_row_groups) == (1, 3)
    one.close()
    many.close()


def test_nothing_verified_is_an_error_with_a_remedy(tiny, stage, prompts, tmp_path):
    def explain(**change):
        with pytest.raises(StoppedError) as caught:
            make_traces(*tiny, stage.model_copy(update=change), prompts, tmp_path / str(len(change)))
        return str(caught.value)

    math = [Prompt(p.messages, "12345", p.id, p.place) for p in prompts]
    with pytest.raises(StoppedError, match=r"traces: none of 14 answers was verified by math; look at some answers"):
        make_traces(*tiny, stage.model_copy(update={"verifier": "auto", "max_new_tokens": 60}), math, tmp_path / "m")
    text = explain(max_new_tokens=1)
    assert "did not end within max_new_tokens 1: raise it" in text
    assert not (tmp_path / "1" / "traces.parquet").exists()


def test_what_cannot_work_is_refused_before_anything_is_generated(tiny, stage, prompts, tmp_path, monkeypatch):
    model = Counting(tiny[0], fail_at=0)

    def refuse(message, error=ValueError, prompts=prompts, **change):
        with pytest.raises(error, match=message):
            make_traces(model, tiny[1], stage.model_copy(update=change), prompts, tmp_path)

    refuse("prompts: none were given", prompts=[])
    refuse("samples 2: greedy answers are all the same", temperature=0.0)
    refuse("verifier math: file:1 has no answer to compare with", verifier="math")
    refuse("verifier: 'odd' is unknown", verifier="odd")
    monkeypatch.setattr(tiny[0].config, "max_position_embeddings", 100)
    long = Prompt([{"role": "user", "content": "why " * 90}], None, "x", "file:99")
    refuse("file:99: it has .* tokens, but the model holds", prompts=[*prompts, long])
    system = Prompt([{"role": "system", "content": "be kind"}, *long.messages], None, "x", "file:99")
    refuse(r"file:99: the tokenizer's chat template does not take it \(role system .*; change", prompts=[system])
    refuse("engine vllm: it loads the model itself; give its path, not a Counting", engine="vllm")


def test_vllm_loads_the_model_by_its_path_and_only_if_there_is_work(tiny, stage, prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake := FakeVllm(tiny[1].eos_token_id))
    stage = stage.model_copy(update={"engine": "vllm", "verifier": "none"})
    stats = make_traces("some/model", tiny[1], stage, prompts, tmp_path)
    assert fake.options["model"] == "some/model"
    row = pq.read_table(tmp_path / "traces.parquet").to_pylist()[0]
    assert (row["engine"], row["model"]) == ("vllm", "some/model")
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert make_traces("some/model", tiny[1], stage, prompts, tmp_path) == stats


@pytest.fixture(scope="module")
def trained():
    return load_teacher(TEACHER, dtype=torch.float32), AutoTokenizer.from_pretrained(TEACHER)


def test_trained_teacher_makes_traces_that_are_right_and_can_be_trained_on(trained, tmp_path):
    prompts = read_prompts(WorldDataSpec(levels=(1,), tasks=("addition", "recall")), 6, seed=0)
    stage = TracesStage(name="t", temperature=0.0, max_new_tokens=120, batch_size=8)
    stats = make_traces(*trained, stage, prompts, tmp_path)
    assert stats["verified"] >= 5
    assert stats["tasks"]["addition"]["samples"] == stats["tasks"]["recall"]["samples"] == 3
    assert sum(task["verified"] for task in stats["tasks"].values()) == stats["verified"]
    rows = pq.read_table(tmp_path / "traces.parquet").to_pylist()
    for row in rows:
        _, task, level, seed, index = row["id"].split("/")
        problem = draw_problem(task, int(level), "train", int(index), int(seed))
        assert row["prompt"] == problem.question
        assert judge(problem, row["completion"]).correct
        assert row["verifier"] == "world"
    data = FileDataSpec(path=str(tmp_path / "traces.parquet"))
    chats = list(islice(iter_conversations(data, 0), len(rows)))
    assert sorted(chat[1]["content"] for chat in chats) == sorted(row["completion"] for row in rows)
    packed = pack_rows(data, trained[1], 256, 1, 0)
    ids = packed[0]["input_ids"][packed[0]["completion"]].tolist()
    assert trained[1].decode(ids).split("<|end|>")[0] in {row["completion"] for row in rows}


def test_trained_teacher_at_a_high_temperature_is_kept_only_where_it_is_right(trained, tmp_path):
    prompts = read_prompts(WorldDataSpec(levels=(1,), tasks=("recall",)), 2, seed=1)
    stage = TracesStage(
        name="t", temperature=2.0, top_p=1.0, samples_per_prompt=4, max_new_tokens=60, batch_size=8, seed=2
    )
    stats = make_traces(*trained, stage, prompts, tmp_path)
    assert 0 < stats["verified"] < stats["samples"] == 8
    problems = {prompt.id: prompt.problem for prompt in prompts}
    rows = pq.read_table(tmp_path / "traces.parquet").to_pylist()
    assert len(rows) == stats["verified"]
    assert all(judge(problems[row["id"]], row["completion"]).correct for row in rows)

import shutil
import socket

import pytest
import torch
from harness_bench import DATA, Scripted, gold_letter, gold_reply, write_benchmarks
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer

from hybridize.evaluation.harness import models, run_harness
from hybridize.models import load_teacher, save_hybrid
from hybridize.spec.layout import LayoutSpec
from hybridize.spec.mixers import Mamba1Spec
from hybridize.transfer import convert

TASKS = ["hybridize_mmlu", "hybridize_gsm8k"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("something went for the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def stories():
    folder = DATA / "models" / "stories260K_hf"
    if not folder.is_dir():
        pytest.skip(f"no trained model at {folder}; set HYBRIDIZE_DATA")
    return folder


def make_hybrid(teacher, num_layers, replaced, folder):
    hybrid, _ = convert(load_teacher(teacher), LayoutSpec.replace(num_layers, replaced, Mamba1Spec(state_size=8)))
    return save_hybrid(hybrid, AutoTokenizer.from_pretrained(teacher), folder)


def likelihoods(folder, pairs):
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    return models.load_lm(str(folder), "hf", 3).loglikelihood(requests, disable_tqdm=True)


def check_likelihoods(teacher, num_layers, tmp_path):
    """A hybrid of attention only says what its teacher says, one with a mixer says something else."""
    same = make_hybrid(teacher, num_layers, (), tmp_path / "same")
    other = make_hybrid(teacher, num_layers, (1,), tmp_path / "other")
    contexts = ["Once upon a time there was a", "Lily saw a big dog. Answer:", "x"]
    pairs = [(context, end) for context in contexts for end in (" A", " B", " little girl and")]
    ours = likelihoods(teacher, pairs)
    assert len(set(ours)) == len(pairs)
    assert likelihoods(same, pairs) == ours
    assert all(a[0] != b[0] for a, b in zip(ours, likelihoods(other, pairs), strict=True))


def test_likelihoods_of_a_hybrid_without_mixers_are_the_teachers(tiny_teacher, tmp_path):
    check_likelihoods(tiny_teacher, 4, tmp_path)


def test_likelihoods_of_a_trained_model_are_kept_without_mixers(stories, tmp_path):
    check_likelihoods(stories, 5, tmp_path)


def test_a_trained_model_and_its_hybrid_run_through(stories, bench, tmp_path, capfd):
    folder = DATA / "bench" if (DATA / "bench").is_dir() else bench
    told = []
    hybrid = make_hybrid(stories, 5, (1, 3), tmp_path / "hybrid")
    capfd.readouterr()
    for path in (stories, hybrid):
        results = run_harness(
            str(path),
            TASKS,
            limit=2,
            batch_size=4,
            benchmarks=folder,
            max_new_tokens=12,
            on_progress=lambda done, total: told.append((done, total)),
        )
        for name in TASKS:
            assert results["tasks"][name]["num_samples"] == 2
            assert 0 <= results["tasks"][name]["value"] <= 1
        assert not results["chat_template"]
        assert (results["backend"], results["limit"], results["batch_size"]) == ("hf", 2, 4)
        assert results["seconds"] > 0
        # 512 positions are too few for five examples, which is said.
        assert any("512" in warning for warning in results["warnings"]) == (folder != bench)
    assert told == [(i, 10) for i in range(1, 11)] * 2
    assert capfd.readouterr() == ("", "")


def test_a_chat_model_is_asked_through_its_template(tiny_teacher, bench, tmp_path):
    hybrid = make_hybrid(tiny_teacher, 4, (2,), tmp_path / "hybrid")
    results = run_harness(str(hybrid), ["hybridize_gsm8k"], benchmarks=bench, max_new_tokens=4)
    assert results["chat_template"]
    assert results["warnings"] == []
    assert results["tasks"]["hybridize_gsm8k"]["num_samples"] == 3


@pytest.mark.parametrize("are_special", [False, True])
def test_marks_of_thinking_stay_though_they_are_special(tiny_teacher, tmp_path, are_special):
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    if are_special:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
        tokenizer.save_pretrained(folder)
    lm = models.load_lm(str(folder), "hf", 1)
    marks = [lm.tokenizer.added_tokens_decoder[i].special for i in lm.tokenizer.convert_tokens_to_ids(["<think>"])]
    assert marks == [are_special]
    text = "<think>\nred\n</think>\n47"
    ids = lm.tokenizer(f"{text}{lm.tokenizer.eos_token}", add_special_tokens=False).input_ids
    assert lm.tok_decode([lm.tokenizer.bos_token_id, *ids]) == text
    assert lm.tok_decode(ids, skip_special_tokens=False) == text + lm.tokenizer.eos_token
    assert lm.tok_decode(lm.tokenizer.eos_token_id, skip_special_tokens=False) == lm.tokenizer.eos_token


def test_vllm_runs_the_requests_if_it_is_there(bench, monkeypatch):
    made = []

    class Served(Scripted):
        def __init__(self, **options):
            super().__init__(gold_reply, gold_letter)
            made.append(options)

    monkeypatch.setattr(models, "find_spec", lambda name: object())
    monkeypatch.setattr(models, "get_model", {"vllm": Served}.__getitem__)
    results = run_harness("some/model", TASKS, backend="vllm", batch_size=64, benchmarks=bench)
    assert made == [{"pretrained": "some/model", "batch_size": "auto", "max_batch_size": 64}]
    assert [results["tasks"][name]["value"] for name in TASKS] == [1.0, 1.0]
    assert results["backend"] == "vllm"


def test_without_vllm_the_error_names_the_extra(bench, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"backend vllm: vllm is not installed; pip install 'hybridize\[serve\]'"):
        run_harness("some/model", TASKS, backend="vllm", benchmarks=bench)


def test_lm_eval_names_vllms_model_and_options(monkeypatch):
    """What the fake above stands for: the name and the arguments that lm-evaluation-harness gives vLLM."""
    import ast
    from importlib.util import find_spec
    from pathlib import Path

    from lm_eval.models import MODEL_MAPPING

    module, _, name = MODEL_MAPPING["vllm"].partition(":")
    tree = ast.parse(Path(find_spec(module).origin).read_text())
    [made] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    [init] = [node for node in made.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    assert {"pretrained", "batch_size", "max_batch_size"} <= {argument.arg for argument in init.args.args}

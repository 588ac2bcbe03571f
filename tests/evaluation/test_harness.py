import ast
import logging
import re
import socket
from pathlib import Path

import lm_eval.tasks
import nltk
import pytest
from harness_bench import DATA, OFFLINE, Scripted, gold_letter, gold_reply, write_benchmarks, write_splitter
from lm_eval.tasks import TaskManager

from hybridize.evaluation import harness
from hybridize.evaluation.harness import OFFLINE_TASKS, evaluate_lm, run_harness
from hybridize.evaluation.harness.results import summarise_results


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


@pytest.fixture(autouse=True)
def splitter(monkeypatch, tmp_path_factory):
    folder = write_splitter(tmp_path_factory.mktemp("nltk"))
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    return folder


def test_gold_answers_are_all_right(bench):
    told = []
    lm = Scripted(gold_reply, gold_letter)
    results = evaluate_lm(lm, OFFLINE, benchmarks=bench, on_progress=lambda done, total: told.append((done, total)))
    tasks = results["tasks"]
    assert set(tasks) == set(OFFLINE) == set(OFFLINE_TASKS)
    for task in tasks.values():
        assert {name: metric["value"] for name, metric in task["metrics"].items()} == dict.fromkeys(
            task["metrics"], 1.0
        )
        assert task["value"] == task["metrics"][task["metric"]]["value"]
    counts = {"hybridize_aqua": 2, "hybridize_gsm8k": 3, "hybridize_ifeval": 2, "hybridize_math500": 2}
    assert {name: task["num_samples"] for name, task in tasks.items()} == counts | {"hybridize_mmlu": 5}
    assert {name: task["num_fewshot"] for name, task in tasks.items()} == dict.fromkeys(counts, 0) | {
        "hybridize_mmlu": 5
    }
    assert {task["version"] for task in tasks.values()} == {1}
    assert {name: task["metric"] for name, task in tasks.items()} == {
        "hybridize_aqua": "acc",
        "hybridize_gsm8k": "exact_match",
        "hybridize_ifeval": "prompt_level_strict_acc",
        "hybridize_math500": "math_verify",
        "hybridize_mmlu": "acc",
    }
    assert len(tasks["hybridize_ifeval"]["metrics"]) == 4
    assert told[-1] == (9 + 4 * 5, 9 + 4 * 5)  # a request for each answer, and for each letter
    assert results["warnings"] == []
    assert not results["chat_template"]


def test_wrong_answers_are_all_wrong(bench):
    others = {"18": "81", "1,250": "125", "-3": "3", "\\frac{1}{2}": "\\frac{1}{3}", "2": "4"}

    def wrong(doc):
        if "correct" in doc:
            return "Answer: A"
        return "no, never" if "key" in doc else f"#### {others[doc['answer']]} \\boxed{{{others[doc['answer']]}}}"

    lm = Scripted(wrong, lambda doc: "ABCD"[(doc["answer"] + 1) % 4])
    tasks = evaluate_lm(lm, OFFLINE, benchmarks=bench)["tasks"]
    assert {name: task["value"] for name, task in tasks.items()} == dict.fromkeys(OFFLINE, 0.0)


def test_a_share_has_its_standard_error(bench):
    lm = Scripted(lambda doc: "#### 18")  # right once in three
    task = evaluate_lm(lm, ["hybridize_gsm8k"], benchmarks=bench)["tasks"]["hybridize_gsm8k"]
    assert task["value"] == pytest.approx(1 / 3)
    assert task["stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)
    task = evaluate_lm(lm, ["hybridize_gsm8k"], benchmarks=bench, limit=1)["tasks"]["hybridize_gsm8k"]
    assert (task["value"], task["stderr"], task["num_samples"]) == (1.0, None, 1)


def test_thinking_is_no_answer_and_thinking_without_end_is_wrong(bench):
    def reply(doc):
        return {
            "18": "<think>maybe 5</think>\n#### 18",  # right behind the thinking
            "1,250": "<think>#### 1250</think>I do not know.",  # right in it only
            "-3": "<think>it is -3, #### -3",  # never ends
        }[doc["answer"]]

    task = evaluate_lm(Scripted(reply), ["hybridize_gsm8k"], benchmarks=bench)["tasks"]["hybridize_gsm8k"]
    assert task["value"] == pytest.approx(1 / 3)
    assert task["num_unfinished"] == 1


class Chatting(Scripted):
    """Has a chat template, which may open the thinking."""

    class tokenizer:  # noqa: N801
        chat_template = "some"

    tokenizer_name = "chatting"
    max_length = 1000
    tail = "<think>\n"

    def apply_chat_template(self, messages, add_generation_prompt=True):
        assert add_generation_prompt
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]" + self.tail


def test_thinking_opened_by_the_template_must_end_too(bench):
    replies = {"18": "by 6\n</think>\n#### 18", "1,250": "it is 1250", "-3": "</think>-3"}
    results = evaluate_lm(Chatting(lambda doc: replies[doc["answer"]]), ["hybridize_gsm8k"], benchmarks=bench)
    task = results["tasks"]["hybridize_gsm8k"]
    assert results["chat_template"]
    assert task["value"] == pytest.approx(2 / 3)
    assert task["num_unfinished"] == 1
    assert task["max_new_tokens"] == 500  # half of what it can read


def test_prompts_are_chats_but_for_letters(bench):
    lm = Chatting(gold_reply, gold_letter)
    lm.tail = ""
    tasks = ["hybridize_gsm8k", "hybridize_mmlu", "hybridize_aqua"]
    assert evaluate_lm(lm, tasks, benchmarks=bench, limit=2)["chat_template"]
    generated = [asked for asked in lm.asked if isinstance(asked[1], dict)]
    prompt, options = generated[0]
    assert prompt.startswith("[user]Ana has 3 jars of 6 plums. How many plums?\n\nSolve")
    assert prompt.endswith("[assistant]")
    assert options == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 500}
    aqua = next(prompt for prompt, _ in generated if "9 - 4?" in prompt)
    assert "\n\nA)1\nB)2\nC)3\nD)4\nE)5\n\n" in aqua
    letters = [asked for asked in lm.asked if not isinstance(asked[1], dict)]
    assert [letter for _, letter in letters] == [" A", " B", " C", " D"] * 2
    first, second = letters[0][0], letters[4][0]
    shown = [
        f'high_school_biology dev, "{i}"?\nSay.\n'
        + "".join(f"{c}. high_school_biology{i}{v}\n" for c, v in zip("ABCD", "wxyz", strict=True))
        + f"Answer: {'ABCD'[i % 4]}\n\n"
        for i in range(5)
    ]
    asked = (
        'high_school_biology test, "0"?\nSay.\nA. high_school_biology0w\nB. high_school_biology0x\n'
        "C. high_school_biology0y\nD. high_school_biology0z\nAnswer:"
    )
    head = "Questions about high school biology, each with four choices and the letter of the right one.\n\n"
    assert first == head + "".join(shown) + asked
    assert "biology" not in second  # subjects take turns, each with examples of its own
    assert second.count("world_religions dev") == 5
    assert not evaluate_lm(lm, ["hybridize_mmlu"], benchmarks=bench, limit=2)["chat_template"]


def test_without_a_template_prompts_are_plain(bench):
    lm = Chatting(gold_reply)
    results = evaluate_lm(lm, ["hybridize_ifeval"], benchmarks=bench, apply_chat_template=False, max_new_tokens=7)
    assert not results["chat_template"]
    assert lm.asked[0][0] == "Name three trees without commas in at least two sentences."
    assert lm.asked[0][1]["max_gen_toks"] == results["tasks"]["hybridize_ifeval"]["max_new_tokens"] == 7


def test_a_budget_that_leaves_no_room_is_refused(bench):
    with pytest.raises(ValueError, match=r"max_new_tokens: 1000 leave no room for a prompt in the model's 1000"):
        evaluate_lm(Chatting(gold_reply), ["hybridize_gsm8k"], benchmarks=bench, max_new_tokens=1000)


def test_instructions_are_checked_one_by_one(bench):
    replies = {7: "Oak, Elm. Ash.", 9: "THIS IS A SENTENCE OF ENGLISH WORDS"}
    lm = Scripted(lambda doc: replies[doc["key"]])
    task = evaluate_lm(lm, ["hybridize_ifeval"], benchmarks=bench)["tasks"]["hybridize_ifeval"]
    values = {name: metric["value"] for name, metric in task["metrics"].items()}
    assert values == {
        "prompt_level_strict_acc": 0.5,
        "inst_level_strict_acc": 0.75,
        "prompt_level_loose_acc": 0.5,
        "inst_level_loose_acc": 0.75,
    }


def test_sentences_need_a_splitter_that_nobody_downloads(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"hybridize_ifeval: nltk's tokenizers/punkt_tab is not on this machine; run"):
        evaluate_lm(Scripted(gold_reply), ["hybridize_ifeval"], benchmarks=bench)


def test_instructions_name_the_package_that_is_missing(bench, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "langdetect" else object())
    with pytest.raises(ImportError, match=r"langdetect is not installed; pip install 'hybridize\[eval\]'"):
        evaluate_lm(Scripted(gold_reply), ["hybridize_ifeval"], benchmarks=bench)


def test_unknown_tasks_name_near_ones(bench):
    with pytest.raises(ValueError, match=r"'hybridize_gsm8' is unknown; did you mean hybridize_gsm8k"):
        evaluate_lm(Scripted(), ["hybridize_aqua", "hybridize_gsm8"], benchmarks=bench)


def test_lm_evals_own_tasks_are_known_and_misspelt_ones_are_not(monkeypatch):
    looked = []

    class Few(TaskManager):  # all of them are 14,000 files
        def __init__(self, include_path, include_defaults, metadata):
            looked.append(include_defaults)
            defaults = [Path(lm_eval.tasks.__file__).parent / "arc"] if include_defaults else []
            super().__init__(include_path=[*defaults, include_path], include_defaults=False, metadata=metadata)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    with pytest.raises(ValueError, match=r"'arc_chalenge' is unknown; did you mean arc_challenge"):
        evaluate_lm(Scripted(), ["arc_chalenge"])
    with pytest.raises(ValueError, match=r"'arc_chalenge' is unknown; did you mean arc_challenge"):
        evaluate_lm(Scripted(), ["hybridize_aqua", "arc_chalenge"], benchmarks=".")
    assert looked == [True, True]


def test_results_name_filters_and_count_groups():
    measured = {
        "name": "x",
        "alias": "x",
        "exact,strict": 0.25,
        "exact_stderr,strict": 0.1,
        "exact,loose": 0.5,
        "exact_stderr,loose": "N/A",
        "sample_len": 4,
    }
    group = {"alias": "g", "acc,none": 0.5, "acc_stderr,none": 0.2, "sample_count": {"acc,none": 9}}
    results = {"results": {"x": measured, "g": group, "bare": {"alias": "b"}}, "versions": {"x": 3}, "n-shot": {"x": 2}}
    summary = summarise_results(results)
    assert summary["x"] == {
        "metric": "exact,strict",
        "value": 0.25,
        "stderr": 0.1,
        "num_samples": 4,
        "num_fewshot": 2,
        "version": 3,
        "metrics": {"exact,strict": {"value": 0.25, "stderr": 0.1}, "exact,loose": {"value": 0.5, "stderr": None}},
    }
    assert (summary["g"]["metric"], summary["g"]["num_samples"], summary["g"]["version"]) == ("acc", 9, None)
    assert set(summary) == {"x", "g"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, r"tasks: \[\] names none"),
        ({"tasks": "hybridize_mmlu"}, "tasks: 'hybridize_mmlu' names none; give a list"),
        ({"limit": 0}, "limit: 0 is too small; use 1 or more"),
        ({"batch_size": 0}, "batch_size: 0 is too small"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is too small"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run_harness("nowhere", **({"tasks": ["hybridize_mmlu"]} | options))


def test_the_folder_comes_from_the_option_or_the_environment(bench, monkeypatch, tmp_path):
    monkeypatch.delenv("HYBRIDIZE_DATA", raising=False)
    lm = Scripted(gold_reply)
    with pytest.raises(ValueError, match=r"--benchmarks.*HYBRIDIZE_DATA"):
        evaluate_lm(lm, ["hybridize_aqua"])
    with pytest.raises(ValueError, match=r"benchmarks: there is no folder .*gone"):
        evaluate_lm(lm, ["hybridize_aqua"], benchmarks=tmp_path / "gone")
    (tmp_path / "bench").symlink_to(bench)
    monkeypatch.setenv("HYBRIDIZE_DATA", str(tmp_path))
    assert evaluate_lm(lm, ["hybridize_aqua"])["tasks"]["hybridize_aqua"]["value"] == 1


def test_a_run_is_quiet_keeps_warnings_and_leaves_the_loggers_as_they_were(bench, capfd):
    logger = logging.getLogger("lm_eval")
    before = logger.handlers[:], logger.level, logger.propagate

    class Loud(Scripted):
        def generate_until(self, requests, disable_tqdm=False):
            for length in (700, 800):
                logging.getLogger("lm_eval.models.x").warning("prompt of %s tokens cut", length)
            logging.getLogger("lm_eval.models.x").info("chatter")
            return super().generate_until(requests, disable_tqdm)

    results = evaluate_lm(Loud(gold_reply), ["hybridize_aqua"], benchmarks=bench)
    assert results["warnings"] == ["prompt of 700 tokens cut (2 such warnings)"]
    assert (logger.handlers, logger.level, logger.propagate) == before
    assert capfd.readouterr() == ("", "")


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lm-evaluation-harness is not installed; pip install 'hybridize\[eval\]'"):
        run_harness("x", ["hybridize_mmlu"])


def test_nothing_imports_lm_eval_before_it_is_looked_for():
    folder = Path(harness.__file__).parent
    for path in set(folder.glob("*.py")) - {folder / "models.py", folder / "subjects.py"}:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "lm_eval" not in ast.unparse(node), path
                assert not re.search(r"harness\.(models|subjects)", ast.unparse(node)), path


def test_real_benchmarks_are_whole_and_their_own_answers_right():
    folder = DATA / "bench"
    if not folder.is_dir():
        pytest.skip(f"no benchmarks at {folder}; set HYBRIDIZE_DATA")

    def reply(doc):
        return "x" if "key" in doc else gold_reply(doc)

    lm = Scripted(reply, gold_letter)
    tasks = evaluate_lm(lm, OFFLINE, benchmarks=folder, limit=60)["tasks"]
    del tasks["hybridize_ifeval"]
    assert {task["value"] for task in tasks.values()} == {1.0}
    assert {task["num_samples"] for task in tasks.values()} == {60}

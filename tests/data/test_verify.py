"""Verifiers: what they accept, what they ask of a prompt, and how a user's own function fails."""

import sys
import threading
import time

import pytest

from hybridize.data.generation import Generated
from hybridize.data.sources import Prompt
from hybridize.data.verify import final_answer, load_verifier
from hybridize.data.verify_math import MathJudge
from hybridize.data.world import TASKS, draw_problem


def ask(answer, problem=None):
    return Prompt([{"role": "user", "content": "what?"}], answer, "7", "file.jsonl:7", problem)


def reply(text, ended=True):
    return Generated(text, 3, ended)


WORLD = [draw_problem(task, 1, "train", 0) for task in TASKS]


def test_world_wants_right_steps_and_a_right_answer():
    prompts = [ask(problem.answer, problem) for problem in WORLD]
    verify = load_verifier("auto", prompts)
    assert verify.name == "world"
    for prompt in prompts:
        gold = prompt.problem.messages[-1]["content"]
        assert verify(prompt, reply(gold))
        assert not verify(prompt, reply(gold, ended=False))
        assert not verify(prompt, reply(gold.rpartition("\n")[0] + "\nnobody"))
        assert not verify(prompt, reply(f"<think>\n- so\n</think>\n{prompt.answer}"))
    with pytest.raises(ValueError, match=r"verifier world: file.jsonl:7 is no problem of the reasoning world; use"):
        load_verifier("world", [*prompts, ask("4")])


def test_none_keeps_all_that_has_words():
    verify = load_verifier("none", [ask(None)])
    assert verify(ask(None), reply("anything"))
    assert verify(ask(None), reply("cut", ended=False))
    assert not verify(ask(None), reply(" \n"))


def test_final_answer_is_behind_the_thinking():
    assert final_answer("<think>1</think>2") == "2"
    assert final_answer("1</think>2") == "2"
    assert final_answer("plainly 2") == "plainly 2"
    assert final_answer("<think>1 and 2") is None
    assert final_answer("<think>a</think>b<think>c</think>d") == "d"


def test_final_answer_stands_between_apriels_marks():
    steps = "Here are my reasoning steps:\n7? No, 2.\n"
    assert final_answer(f"{steps}[BEGIN FINAL RESPONSE]\n2\n[END FINAL RESPONSE]") == "2"
    assert final_answer("7? No.\n[BEGIN FINAL RESPONSE]\n2 and\n3\n[END FINAL RESPONSE]\n<|end|>") == "2 and\n3"
    assert final_answer(f"{steps}[BEGIN FINAL RESPONSE]\n2\n") == "2", "later models leave the end out"
    assert final_answer("I write [BEGIN FINAL RESPONSE] 7 or\n[BEGIN FINAL RESPONSE]\n2") == "2"
    assert final_answer(steps) is None
    assert final_answer("<think>[BEGIN FINAL RESPONSE]\n2") is None
    assert final_answer("What are my reasoning steps? Here are my reasoning steps: none") is not None


RIGHT = [
    ("18", "The answer is 18."),
    ("so 9 * 2 = 18\n#### 18", r"\boxed{18}"),
    ("#### 1,234", "It costs $1234."),
    (r"\frac{1}{2}", "0.5"),
    (r"$x = \frac{1}{2}$", r"\boxed{0.5}"),
    (r"\$18.90", r"So \boxed{\$18.90}."),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\(\boxed{(3, \frac{\pi}{2})}\)"),
    (r"\text{Evelyn}", r"$\boxed{\text{Evelyn}}$"),
    ("18", "<think>7? No.</think>\n18"),
    ("18", "7? No.\n[BEGIN FINAL RESPONSE]\n18\n[END FINAL RESPONSE]"),
]
WRONG = [
    ("18", "19"),
    ("18", "<think>18</think>17"),
    ("18", "<think>It is 18"),
    ("18", "18? No.\n[BEGIN FINAL RESPONSE]\n17\n[END FINAL RESPONSE]\n18"),
    ("18", "Here are my reasoning steps:\nIt is 18"),
    ("18", "no idea"),
    (r"\frac{1}{2}", "2"),
]


@pytest.fixture(scope="module")
def math():
    verify = load_verifier("auto", [ask("1")])
    assert verify.name == "math"
    yield verify
    verify.close()


@pytest.mark.parametrize(("reference", "text"), RIGHT)
def test_math_accepts_what_is_equal(math, reference, text):
    assert math(ask(reference), reply(text))
    assert not math(ask(reference), reply(text, ended=False))


@pytest.mark.parametrize(("reference", "text"), WRONG)
def test_math_refuses_what_is_not_or_only_thought(math, reference, text):
    assert not math(ask(reference), reply(text))


def test_math_works_outside_the_main_thread(math):
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend(math(ask("18"), reply(t)) for t in ("18", "19")))
    thread.start()
    thread.join()
    assert verdicts == [True, False]


def test_endless_arithmetic_is_given_up_and_the_next_question_answered():
    judge = MathJudge(patience_seconds=0.5)
    assert judge("$18$", "18")
    started = time.monotonic()
    assert not judge("$18$", r"$\boxed{2^{10^{12}}}$")
    assert time.monotonic() - started < 4
    judge._patience_seconds = 20
    assert judge("$18$", "18")
    judge.close()
    assert judge("$18$", "18")  # begins anew
    judge.close()


def test_math_needs_answers_and_its_library(monkeypatch):
    with pytest.raises(ValueError, match=r"verifier math: file.jsonl:7 has no answer to compare with; add a column"):
        load_verifier("math", [ask("1"), ask(None)])
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(
        ImportError, match=r"verifier math: math-verify is not installed; pip install 'hybridize\[eval\]'"
    ):
        load_verifier("math", [ask("1")])


@pytest.fixture
def write_function(tmp_path):
    def write(text):
        (tmp_path / "checks.py").write_text(text)
        return tmp_path / "checks.py"

    return write


def test_function_of_ones_own_gets_prompt_reply_and_reference(write_function):
    path = write_function(
        "def check(prompt, answer, reference):\n    return (prompt, answer, reference) == ('what?', 'a', '4')\n"
    )
    verify = load_verifier(f"{path}:check", [ask("4")])
    assert verify.name == f"{path}:check"
    assert verify(ask("4"), reply("a"))
    assert not verify(ask("5"), reply("a"))
    assert not verify(ask("4"), reply("a", ended=False))
    assert "hybridize_verifier_checks" not in sys.modules


def test_function_may_return_numpys_truth(write_function):
    path = write_function("import numpy\ndef check(p, a, r):\n    return numpy.float64(len(a)) > 2\n")
    verify = load_verifier(f"{path}:check", [])
    assert verify(ask(None), reply("abc")) is True
    assert verify(ask(None), reply("a")) is False


FAULTY = [
    ("1 +", "check", r"checks.py:check: .*checks.py does not load \(SyntaxError: .*\); mend it"),
    ("import nothing_such", "check", r"does not load \(ModuleNotFoundError: No module named 'nothing_such'\)"),
    ("def chek(): pass\nx = 1", "check", "has no function 'check'; use one of chek"),
    ("check = 4", "check", "has no function 'check'; use one of none"),
    (
        "def check(p, a, r): return 1 / 0",
        "",
        r"checks.py:check: it failed at file.jsonl:7 \(ZeroDivisionError: division",
    ),
    ("def check(p, a): return True", "", r"it failed at file.jsonl:7 \(TypeError: check\(\) takes 2"),
    ("def check(p, a, r): return 0.5", "", "at file.jsonl:7 it returned 0.5; return True or False"),
]


@pytest.mark.parametrize(("text", "name", "message"), FAULTY, ids=range(len(FAULTY)))
def test_faulty_function_is_named_with_row_and_exception(text, name, message, write_function):
    path = write_function(text)
    if name:
        with pytest.raises(ValueError, match=message):
            load_verifier(f"{path}:{name}", [])
        return
    verify = load_verifier(f"{path}:check", [])
    with pytest.raises(ValueError, match=message):
        verify(ask("4"), reply("a"))


def test_unknown_verifier_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"verifier: 'maths' is unknown; use one of auto, world, math, none, or file.py:"
    ):
        load_verifier("maths", [])
    with pytest.raises(ValueError, match=r"verifier none.py:f: there is no file none.py; check the path"):
        load_verifier("none.py:f", [])
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"x.txt is no Python file; give one that ends in .py"):
        load_verifier(f"{tmp_path}/x.txt:f", [])

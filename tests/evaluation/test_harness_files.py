import json
from decimal import Decimal

import nltk
import pytest
from harness_bench import AQUA, DATA, GSM8K, IFEVAL, SUBJECTS, write_benchmarks, write_splitter

from hybridize.data.tables import JsonLines
from hybridize.evaluation.harness import files
from hybridize.evaluation.harness.instructions import follow_instructions
from hybridize.evaluation.harness.scoring import (
    close_judges,
    final_letter,
    final_number,
    score_aqua,
    score_gsm8k,
    score_math500,
)


@pytest.fixture
def bench(tmp_path):
    return write_benchmarks(tmp_path / "bench")


@pytest.fixture(autouse=True)
def splitter(monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(write_splitter(tmp_path / "nltk"))])


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("#### 18", 18),
        ("#### 18\nThat is for 3 days.", 18),  # what is marked, not what is last
        ("**#### $1,250.50.**", Decimal("1250.50")),
        ("#### -3", -3),
        ("#### -$3", -3),
        ("#### 4 eggs", 4),
        ("#### 1. Read\n7 are left.", 7),  # headings
        ("#### 12. Read\n7 are left.", 7),
        ("#### 1. Add\n#### 2) Take\nThe total is 9.\n#### 90", 90),
        ("#### Answer: 5", 5),
        ("It is \\boxed{1{,}000} for all 3.", 1000),
        ("\\boxed{\\$42} of 7", 42),
        ("x = 10-3 = 7", 7),
        ("it fell to .5", Decimal("0.5")),
        ("so 3, 4, 5", 5),
        ("no number at all", None),
        ("", None),
    ],
)
def test_the_final_number_is_the_marked_one_or_the_last(reply, number):
    assert final_number(reply) == number


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("Answer: B", "B"),
        ("Answer: A is tempting.\nAnswer: D", "D"),
        ("The answer is (C).", "C"),
        ("**Answer:** D", "D"),
        ("**Final answer**: **E**", "E"),
        ("Answer: $\\boxed{\\text{B}}$", "B"),
        ("hence \\boxed{E}", "E"),
        ("hence \\boxed{(A)}", "A"),
        ("B", "B"),
        ("B) 7", "B"),
        ("It is:\n(C)", "C"),
        ("A car drives.", None),
        ("the answer is a mess", None),
        ("Answer: Each of them", None),
        ("", None),
    ],
)
def test_the_final_letter_is_said_to_be_it(reply, letter):
    assert final_letter(reply) == letter


def test_numbers_are_compared_as_numbers():
    doc = {"answer": "1,250"}
    assert score_gsm8k(doc, ["#### 1250.00"]) == {"exact_match": 1.0}
    assert score_gsm8k(doc, ["#### 1251"]) == {"exact_match": 0.0}
    assert score_gsm8k(doc, [""]) == {"exact_match": 0.0}
    assert score_aqua({"correct": "A"}, [""]) == {"acc": 0.0}


def test_expressions_are_compared_by_what_they_mean():
    doc = {"answer": "\\frac{1}{2}"}
    try:
        for reply, right in (("\\boxed{0.5}", 1.0), ("\\boxed{\\dfrac12}", 1.0), ("\\boxed{2}", 0.0), ("", 0.0)):
            assert score_math500(doc, [reply]) == {"math_verify": right}, reply
    finally:
        close_judges()


def test_mmlu_takes_subjects_in_turn(bench):
    data = files.load_mmlu(str(bench))
    subjects = ["high school biology", "world religions"]
    assert data["test"]["subject"][:] == [*subjects, *subjects, subjects[0]]
    assert data["test"][2]["choices"] == [f"high_school_biology1{c}" for c in "wxyz"]
    assert data["test"][2]["answer"] == 1
    assert data["dev"]["subject"][:] == [name for name in subjects for _ in range(5)]
    assert len(data["test"]) == sum(SUBJECTS.values())


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("path", "rows", "load", "message"),
    [
        ("gsm8k/test.jsonl", [GSM8K[0], {"question": "q", "answer": "7"}], "gsm8k", "jsonl:2: the answer does not end"),
        ("gsm8k/test.jsonl", [{"question": "q", "answer": "#### x"}], "gsm8k", "jsonl:1: the answer does not end"),
        ("gsm8k/test.jsonl", [], "gsm8k", "it has no rows"),
        ("math500/test.jsonl", [{"problem": "p"}], "math500", "jsonl:1: answer is None; write a str"),
        ("aqua/test.json", [AQUA[0] | {"correct": "F"}], "aqua", "json:1: options .* with the answer 'F' are not"),
        ("aqua/test.json", [AQUA[0] | {"options": ["A)1"]}], "aqua", "json:1: options .* are not A.* to E"),
        ("ifeval/input_data.jsonl", [IFEVAL[0] | {"kwargs": []}], "ifeval", "jsonl:1: 2 instructions have 0 kwargs"),
    ],
)
def test_malformed_rows_are_named(bench, path, rows, load, message):
    write_rows(bench / path, rows)
    with pytest.raises(ValueError, match=message):
        getattr(files, f"load_{load}")(str(bench))


def test_missing_files_are_named(bench):
    (bench / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"gsm8k/test.jsonl: it cannot be read"):
        files.load_gsm8k(str(bench))
    (bench / "mmlu" / "dev" / "world_religions_dev.csv").unlink()
    with pytest.raises(ValueError, match=r"world_religions_dev.csv: it cannot be read"):
        files.load_mmlu(str(bench))
    for path in (bench / "mmlu" / "test").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"mmlu/test: there is no SUBJECT_test.csv"):
        files.load_mmlu(str(bench))


def test_malformed_questions_are_named(bench):
    path = bench / "mmlu" / "test" / "world_religions_test.csv"
    path.write_text("q,1,2,3,4,A\nq,1,2,3,4,AB\n")
    with pytest.raises(ValueError, match=r"world_religions_test.csv row 2: .* is no question, four choices"):
        files.load_mmlu(str(bench))
    path.write_text("")
    with pytest.raises(ValueError, match=r"world_religions_test.csv: it has no questions"):
        files.load_mmlu(str(bench))
    path.write_text("q,1,2,3,4,A\n")
    (bench / "mmlu" / "dev" / "world_religions_dev.csv").write_text("q,1,2,3,4,A\n" * 4)
    with pytest.raises(ValueError, match=r"world_religions_dev.csv: it has 4 questions; the prompt shows 5"):
        files.load_mmlu(str(bench))


def test_real_benchmarks_have_all_their_rows():
    folder = DATA / "bench"
    if not folder.is_dir():
        pytest.skip(f"no benchmarks at {folder}; set HYBRIDIZE_DATA")
    names = {"gsm8k": 1319, "math500": 500, "mmlu": 14042, "aqua": 254, "ifeval": 540}
    data = {name: getattr(files, f"load_{name}")(str(folder)) for name in names}
    assert {name: len(splits["test"]) for name, splits in data.items()} == names
    assert len(set(data["mmlu"]["test"]["subject"])) == 57
    assert len(set(data["mmlu"]["test"]["subject"][:57])) == 57
    assert len(data["mmlu"]["dev"]) == 285
    worked = [row["answer"] for _, row in JsonLines(folder / "gsm8k" / "test.jsonl").rows()]
    right = [score_gsm8k(doc, [text])["exact_match"] for doc, text in zip(data["gsm8k"]["test"], worked, strict=True)]
    assert right == [1.0] * 1319
    ran = [follow_instructions(doc, ["A reply, of a SINGLE sentence."]) for doc in data["ifeval"]["test"]]
    assert 0 < sum(sum(scores["inst_level_strict_acc"]) for scores in ran) < 200  # every check runs

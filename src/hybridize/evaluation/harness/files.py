"""Reads the offline benchmarks: from a folder's files to what lm-evaluation-harness asks questions from.

    gsm8k/test.jsonl                question, answer (worked, ending in `#### N`)
    math500/test.jsonl              problem, answer
    mmlu/{dev,test}/SUBJECT_*.csv   question, four choices, letter; no header
    aqua/test.json                  question, options, correct (a letter); an object a line
    ifeval/input_data.jsonl         key, prompt, instruction_id_list, kwargs

The task files name these functions. lm-evaluation-harness calls each with all of a task's metadata, of which only the
folder counts.
"""

import csv
import os
from collections.abc import Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset

from hybridize.data.tables import JsonLines
from hybridize.evaluation.harness.instructions import check_instructions
from hybridize.evaluation.harness.scoring import final_number

_FEW_SHOTS = 5  # as tasks/mmlu.yaml says
_LETTERS = "ABCD"
_OPTIONS = [*"ABCDE"]


def benchmarks_folder(benchmarks: str | Path | None = None) -> Path:
    """The folder of the benchmarks' files: the one given, or `bench` in `$HYBRIDIZE_DATA`.

    Raises:
        ValueError: neither is given, or it is no folder.
    """
    if benchmarks is not None:
        folder = Path(benchmarks)
    elif data := os.environ.get("HYBRIDIZE_DATA"):
        folder = Path(data) / "bench"
    else:
        raise ValueError(
            "benchmarks: nobody says where the benchmarks' files are; give their folder (benchmarks, --benchmarks), or "
            "set HYBRIDIZE_DATA to the folder that holds it under the name bench"
        )
    if not folder.is_dir():
        raise ValueError(f"benchmarks: there is no folder {folder}; give one with gsm8k/, math500/, mmlu/ and so on")
    return folder


def load_gsm8k(benchmarks: str | None = None, **_: Any) -> dict[str, Dataset]:
    """GSM8K (Cobbe et al., arXiv 2110.14168): `question`, and the number behind `####` as `answer`.

    Raises:
        ValueError: a file or a row is not as it should be; so do the other functions here.
    """
    path = benchmarks_folder(benchmarks) / "gsm8k" / "test.jsonl"
    rows = []
    for place, row in _read_lines(path, {"question": str, "answer": str}):
        answer = row["answer"].rpartition("####")[2]
        if answer == row["answer"] or final_number(answer) is None:
            raise ValueError(f"{place}: the answer does not end with #### and a number; write it so")
        rows.append({"question": row["question"], "answer": answer.strip()})
    return {"test": Dataset.from_list(rows)}


def load_math500(benchmarks: str | None = None, **_: Any) -> dict[str, Dataset]:
    """MATH-500 (Lightman et al., arXiv 2305.20050, from MATH, arXiv 2103.03874): `problem` and LaTeX `answer`."""
    path = benchmarks_folder(benchmarks) / "math500" / "test.jsonl"
    rows = [row for _, row in _read_lines(path, {"problem": str, "answer": str})]
    return {"test": Dataset.from_list(rows)}


def load_aqua(benchmarks: str | None = None, **_: Any) -> dict[str, Dataset]:
    """AQuA-RAT (Ling et al., arXiv 1705.04146): `question`, five `options`, `A)...` and so on, a letter `correct`."""
    path = benchmarks_folder(benchmarks) / "aqua" / "test.json"
    rows = []
    for place, row in _read_lines(path, {"question": str, "options": list, "correct": str}):
        letters = [str(option).partition(")")[0] for option in row["options"]]
        if letters != _OPTIONS or row["correct"] not in letters:
            raise ValueError(
                f"{place}: options {letters} with the answer {row['correct']!r} are not A) to E) and one of them; "
                "write five options and a letter"
            )
        rows.append(row)
    return {"test": Dataset.from_list(rows)}


def load_ifeval(benchmarks: str | None = None, **_: Any) -> dict[str, Dataset]:
    """IFEval (Zhou et al., arXiv 2311.07911): prompts, and which checks with which arguments the answer must pass.

    Raises:
        ValueError: see `load_gsm8k`; also if the checks themselves lack data.
        ImportError: the checks lack a package.
    """
    check_instructions()
    path = benchmarks_folder(benchmarks) / "ifeval" / "input_data.jsonl"
    rows = []
    for place, row in _read_lines(path, {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list}):
        if len(row["instruction_id_list"]) != len(row["kwargs"]):
            raise ValueError(
                f"{place}: {len(row['instruction_id_list'])} instructions have {len(row['kwargs'])} kwargs; "
                "give each an object"
            )
        rows.append(row)
    return {"test": Dataset.from_list(rows)}


def load_mmlu(benchmarks: str | None = None, **_: Any) -> dict[str, Dataset]:
    """MMLU (Hendrycks et al., arXiv 2009.03300): `subject`, `question`, `choices`, and `answer` as an index.

    Subjects take turns, one question each, so that the first questions are of all subjects. Of `dev`, which the
    examples are from, each subject has five rows.
    """
    folder = benchmarks_folder(benchmarks) / "mmlu"
    tests = {path.stem.removesuffix("_test"): path for path in sorted((folder / "test").glob("*_test.csv"))}
    if not tests:
        raise ValueError(f"{folder / 'test'}: there is no SUBJECT_test.csv; put one there for each subject")
    by_subject, examples = [], []
    for subject, path in tests.items():
        by_subject.append(_read_questions(path, subject))
        dev = folder / "dev" / f"{subject}_dev.csv"
        shots = _read_questions(dev, subject)
        if len(shots) < _FEW_SHOTS:
            raise ValueError(f"{dev}: it has {len(shots)} questions; the prompt shows {_FEW_SHOTS}")
        examples += shots[:_FEW_SHOTS]
    questions = [row for row in chain.from_iterable(zip_longest(*by_subject)) if row is not None]
    return {"test": Dataset.from_list(questions), "dev": Dataset.from_list(examples)}


def _read_lines(path: Path, columns: Mapping[str, type]) -> list[tuple[str, dict[str, Any]]]:
    """Rows with their places, of these columns only."""
    rows = []
    for place, row in JsonLines(path).rows():
        for name, kind in columns.items():
            if not isinstance(row.get(name), kind):
                raise ValueError(f"{place}: {name} is {row.get(name)!r}; write a {kind.__name__}")
        rows.append((place, {name: row[name] for name in columns}))
    if not rows:
        raise ValueError(f"{path}: it has no rows; write one a line")
    return rows


def _read_questions(path: Path, subject: str) -> list[dict[str, Any]]:
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if len(row) != len(_LETTERS) + 2 or row[-1] not in _LETTERS or len(row[-1]) != 1:
                    raise ValueError(
                        f"{path} row {number}: {row!r:.120} is no question, four choices and a letter of {_LETTERS}; "
                        "write these six"
                    )
                question, *choices, letter = row
                rows.append(
                    {
                        "subject": subject.replace("_", " "),
                        "question": question.strip(),
                        "choices": [choice.strip() for choice in choices],
                        "answer": _LETTERS.index(letter),
                    }
                )
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read ({error.strerror}); check the path") from None
    if not rows:
        raise ValueError(f"{path}: it has no questions; write one a row")
    return rows

"""Small benchmarks in the real ones' formats, and a model that answers what a test tells it to."""

import csv
import json
import os
from pathlib import Path

from lm_eval.api.model import LM

DATA = Path(os.environ.get("HYBRIDIZE_DATA", Path(__file__).parents[3] / "shared" / "data"))

GSM8K = [
    {"question": "Ana has 3 jars of 6 plums. How many plums?", "answer": "3 * 6 = <<3*6=18>>18\n#### 18"},
    {"question": "A loan of 900 grows by 350. What is owed?", "answer": "900 + 350 = 1250\n#### 1,250"},
    {"question": "It is 4 degrees and falls by 7. How warm?", "answer": "4 - 7 = -3\n#### -3"},
]
MATH500 = [
    {"problem": "Halve $1$.", "solution": "s", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 1},
    {"problem": "Solve $x^2=4$, $x>0$.", "solution": "s", "answer": "2", "subject": "Algebra", "level": 1},
]
AQUA = [
    {"question": "1 + 1?", "options": ["A)1", "B)2", "C)3", "D)4", "E)None"], "rationale": "r", "correct": "B"},
    {"question": "9 - 4?", "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "rationale": "r", "correct": "E"},
]
IFEVAL = [
    {
        "key": 7,
        "prompt": "Name three trees without commas in at least two sentences.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"],
        "kwargs": [{}, {"relation": "at least", "num_sentences": 2}],
    },
    {
        "key": 9,
        "prompt": "Say it in capitals. At least 1 word in capitals.",
        "instruction_id_list": ["change_case:english_capital", "change_case:capital_word_frequency"],
        "kwargs": [{}, {"capital_relation": "at least", "capital_frequency": 1}],
    },
]
FOLLOWING = {7: "Oak. Elm. Ash.", 9: "THIS IS A SENTENCE OF ENGLISH WORDS"}
SUBJECTS = {"high_school_biology": 3, "world_religions": 2}
OFFLINE = ("hybridize_aqua", "hybridize_gsm8k", "hybridize_ifeval", "hybridize_math500", "hybridize_mmlu")


def write_benchmarks(folder: Path) -> Path:
    """The five benchmarks, a few rows each."""
    for path, rows in (
        ("gsm8k/test.jsonl", GSM8K),
        ("math500/test.jsonl", MATH500),
        ("aqua/test.json", AQUA),
        ("ifeval/input_data.jsonl", IFEVAL),
    ):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("dev", "test"):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject, num_tests in SUBJECTS.items():
            rows = [
                [f'{subject} {split}, "{i}"?\nSay.', *(f"{subject}{i}{c}" for c in "wxyz"), "ABCD"[i % 4]]
                for i in range(num_tests if split == "test" else 5)
            ]
            with (folder / "mmlu" / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    return folder


def write_splitter(folder: Path) -> Path:
    """nltk's sentence splitter, in its format, knowing a single abbreviation."""
    english = folder / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / name).write_text("dr\n" if name == "abbrev_types.txt" else "")
    return folder


class Scripted(LM):
    """Answers by functions of the request's document; remembers what it was asked."""

    def __init__(self, reply=None, letter=None):
        super().__init__()
        self.reply, self.letter = reply, letter
        self.asked = []

    def generate_until(self, requests, disable_tqdm=False):
        assert disable_tqdm
        self.asked += [request.args for request in requests]
        return [self.reply(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        assert disable_tqdm
        self.asked += [request.args for request in requests]
        return [(-1.0 if request.args[1].strip() == self.letter(request.doc) else -2.0, False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise AssertionError("no task asks this")


def gold_reply(doc):
    """What a right model writes, whatever the task."""
    if "problem" in doc:
        return f"It must be $\\boxed{{{doc['answer']}}}$."
    if "correct" in doc:
        return f"So it is this.\nAnswer: {doc['correct']}"
    if "key" in doc:
        return FOLLOWING[doc["key"]]
    return f"We add 5 and 6.\n#### {doc['answer']}"


def gold_letter(doc):
    return "ABCD"[doc["answer"]]

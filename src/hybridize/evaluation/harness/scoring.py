"""Tells right answers to the offline benchmarks from wrong ones.

Replies come without their thinking (see `models.Watched`); one whose thinking never ended comes empty, and is wrong.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from hybridize.data.verify_math import MathJudge

_NUMBER = r"(?<![\w)])-?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)"
# Behind ####, but for headings such as "#### 2. Add up".
_MARKED = re.compile(rf"####[ \t*:]*((?>{_NUMBER}))(?![.)][ \t]+\S)")
_BOXED = re.compile(rf"\\boxed\{{\s*({_NUMBER})")
_ANY = re.compile(rf"({_NUMBER})")
_LETTERS = (
    re.compile(
        r"(?i:\banswer)\b[^A-Za-z0-9\n]*(?:(?i:is)\b[^A-Za-z0-9\n]*)?(?:boxed\{)?(?:\\text\{)?\(?([A-E])(?![A-Za-z0-9'])"
    ),
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\(?([A-E])(?![A-Za-z0-9])"),
    re.compile(r"^\W*([A-E])(?:\W*$|[).:])", re.MULTILINE),
)

_math_judges: list[MathJudge] = []


def final_number(reply: str) -> Decimal | None:
    r"""The number a reply ends on: the last one behind `####`, else the last in `\boxed{}`, else the last of all.

    Thousands may be set apart by commas, and there may be dollar signs.
    """
    plain = reply.replace("{,}", ",").replace("\\$", "").replace("$", "")
    for pattern in (_MARKED, _BOXED, _ANY):
        if found := pattern.findall(plain):
            return Decimal(found[-1].replace(",", ""))
    return None


def final_letter(reply: str) -> str | None:
    r"""The letter A to E a reply ends on: the last behind `Answer:`, else in `\boxed{}`, else of a line of its own."""
    for pattern in _LETTERS:
        if found := pattern.findall(reply):
            return found[-1]
    return None


def score_gsm8k(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, float]:
    """Whether the final number is the reference's."""
    return {"exact_match": float(final_number(replies[0]) == final_number(doc["answer"]))}


def score_math500(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, float]:
    """Whether math-verify finds the final expression equal to the reference."""
    if not _math_judges:
        _math_judges.append(MathJudge())
    return {"math_verify": float(_math_judges[0](f"${doc['answer']}$", replies[0]))}


def score_aqua(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, float]:
    """Whether the final letter is the reference's."""
    return {"acc": float(final_letter(replies[0]) == doc["correct"])}


def close_judges() -> None:
    """End the process that compares expressions; the next comparison starts one anew."""
    while _math_judges:
        _math_judges.pop().close()

"""What a problem of the reasoning world is, and what a judge says of an attempt."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "test"]

TEST_FRACTION = 1 / 8
"""Share of all problem structures that belong to the test split."""

_BULLET = "- "


@dataclass(frozen=True)
class Problem:
    """One problem with its gold chain of thought.

    Attributes:
        task: name of the task that made it, e.g. `addition`.
        level: difficulty, 1 (easiest) to 8.
        question: what the user asks.
        thinking: the gold steps, one a line.
        answer: the final answer.
        structure: what makes the problem the same problem under other names and numbers; its hash decides
            between train and test.
        facts: what the judge needs, plain data.
    """

    task: str
    level: int
    question: str
    thinking: str
    answer: str
    structure: str
    facts: dict

    @property
    def messages(self) -> list[dict[str, str]]:
        """The problem and its gold answer as a chat, thinking between `<think>` and `</think>`."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": format_reply(self.thinking, self.answer)},
        ]


@dataclass(frozen=True)
class Verdict:
    """A judge's word on one attempt.

    Attributes:
        answer_correct: the final answer is right.
        steps_correct: every step is right and none that the answer needs is missing.
        fault: the first thing that is wrong, in words; empty if nothing is.
    """

    answer_correct: bool
    steps_correct: bool
    fault: str = ""

    @property
    def correct(self) -> bool:
        """Right answer by right steps."""
        return self.answer_correct and self.steps_correct


class StepError(Exception):
    """A step of an attempt is wrong; the message says which and why."""


@dataclass(frozen=True)
class Task:
    """One family of problems: how to draw one, how to judge the steps of an attempt.

    Attributes:
        name: how it is asked for.
        ability: what it needs of a sequence mixer.
        draw: (random source, level) -> problem.
        check_steps: (problem, lines of thinking); raises `StepError` at the first fault.
    """

    name: str
    ability: str
    draw: Callable[[Random, int], Problem]
    check_steps: Callable[[Problem, list[str]], None]


def split_of(problem: Problem) -> Split:
    """The split a problem belongs to: a function of its task and structure alone, never of a seed."""
    digest = hashlib.sha256(f"{problem.task}/{problem.structure}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_FRACTION * 2**64 else "train"


def format_reply(thinking: str, answer: str) -> str:
    """The assistant's message: steps between think tags, a bullet before each, then the answer.

    Behind a bullet a step's first word has a space before it, as in the question: to a tokenizer that takes the space
    along it is the same token in both places. Without, a small teacher learns to look things up by the second word of a
    name only (docs/LOG.md).
    """
    steps = "".join(f"{_BULLET}{line}\n" for line in thinking.splitlines())
    return f"<think>\n{steps}</think>\n{answer}"


def parse_reply(reply: str) -> tuple[list[str], str]:
    """Cut an assistant's message into lines of thinking and the final answer.

    Raises:
        StepError: the think tags are missing or out of order.
    """
    head, opened, rest = reply.partition("<think>")
    thinking, closed, answer = rest.partition("</think>")
    if not opened or not closed or head.strip():
        raise StepError("the reply is not of the form <think> steps </think> answer")
    return [line.strip().removeprefix(_BULLET) for line in thinking.strip().splitlines()], answer.strip()

"""A verifiable reasoning world: endless problems with gold chains of thought, and a judge for every step.

Four tasks that need different things of a sequence mixer; a difficulty from 1 to 8; train and test split by a
hash of a problem's structure, so that no test structure is ever trained on. Everything is a pure function of
its arguments: `draw_problem("swaps", 3, "test", 17)` is the same problem on every machine.
"""

from random import Random

from hybridize.data.world import addition, quantities, recall, swaps
from hybridize.data.world.problem import (
    Problem,
    Split,
    StepError,
    Task,
    Verdict,
    format_reply,
    parse_reply,
    split_of,
)
from hybridize.spec.base import choose
from hybridize.spec.data import MAX_LEVEL, TASK_NAMES

TASKS: dict[str, Task] = {task.name: task for task in (quantities.TASK, addition.TASK, swaps.TASK, recall.TASK)}
assert tuple(TASKS) == TASK_NAMES, "spec and world must name the same tasks"


def draw_problem(task: str, level: int, split: Split, index: int, seed: int = 0) -> Problem:
    """The `index`-th problem of a task, level and split.

    Args:
        task: a name of `TASKS`.
        level: 1..8.
        split: `train` or `test`; the structure of the problem decides, so no structure is in both.
        index: which one.
        seed: another world of problems over the same structures.

    Raises:
        ValueError: an unknown task or a level out of range.
    """
    choose("task", task, TASKS)
    if not 1 <= level <= MAX_LEVEL:
        raise ValueError(f"level: {level} is out of range; use 1..{MAX_LEVEL}")
    rng = Random(f"{seed}/{task}/{level}/{split}/{index}")
    while True:
        problem = TASKS[task].draw(rng, level)
        if split_of(problem) == split:
            return problem


def judge(problem: Problem, reply: str) -> Verdict:
    """Judge an assistant's reply: its final answer, and every step of its thinking."""
    try:
        lines, answer = parse_reply(reply)
    except StepError as fault:
        return Verdict(answer_correct=False, steps_correct=False, fault=str(fault))
    right = answer == problem.answer
    try:
        TASKS[problem.task].check_steps(problem, lines)
    except StepError as fault:
        return Verdict(answer_correct=right, steps_correct=False, fault=str(fault))
    complaint = "" if right else f"the answer is {problem.answer!r}, not {answer!r}"
    return Verdict(answer_correct=right, steps_correct=True, fault=complaint)


__all__ = [
    "MAX_LEVEL",
    "TASKS",
    "Problem",
    "Split",
    "Task",
    "Verdict",
    "draw_problem",
    "format_reply",
    "judge",
    "parse_reply",
    "split_of",
]

"""Column addition with carries: each step reads one column of two numbers and hands a carry on."""

import re
from random import Random

from hybridize.data.world.problem import Problem, StepError, Task

NUM_DIGITS = {1: 3, 2: 4, 3: 5, 4: 6, 5: 8, 6: 10, 7: 13, 8: 16}
"""Digits of the longer number, per level."""

_STEP = re.compile(r"(\d) \+ (\d) \+ ([01]) = (\d{1,2}), write (\d), carry ([01])")


def draw(rng: Random, level: int) -> Problem:
    """Two numbers to add; the longer one has the level's number of digits."""
    num_digits = NUM_DIGITS[level]
    long = rng.randrange(10 ** (num_digits - 1), 10**num_digits)
    short_digits = max(1, num_digits - rng.choice((0, 0, 0, 1, 2)))
    short = rng.randrange(10 ** (short_digits - 1), 10**short_digits)
    first, second = (long, short) if rng.random() < 0.5 else (short, long)
    carry, lines = 0, []
    for one, two in columns(first, second):
        total = one + two + carry
        lines.append(f"{one} + {two} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        carry = total // 10
    return Problem(
        task="addition",
        level=level,
        question=f"What is {first} + {second}?",
        thinking="\n".join(lines),
        answer=str(first + second),
        structure=f"{min(first, second)}+{max(first, second)}",
        facts={"first": first, "second": second},
    )


def columns(first: int, second: int) -> list[tuple[int, int]]:
    """The digits of both numbers column by column, from the ones up, the shorter one padded by zeros."""
    width = max(len(str(first)), len(str(second)))
    one, two = str(first).zfill(width)[::-1], str(second).zfill(width)[::-1]
    return [(int(a), int(b)) for a, b in zip(one, two, strict=True)]


def check_steps(problem: Problem, lines: list[str]) -> None:
    """Each line must add the right column and the carry of the line before; no column may be missing."""
    expected = columns(problem.facts["first"], problem.facts["second"])
    carry = 0
    for position, line in enumerate(lines):
        if position >= len(expected):
            raise StepError(f"step {position + 1}: there is no column left, but it says {line!r}")
        match = _STEP.fullmatch(line)
        if not match:
            raise StepError(f"step {position + 1}: {line!r} is not a column of an addition")
        one, two, carried, total, written, carry_out = map(int, match.groups())
        if (one, two) != expected[position]:
            raise StepError(f"step {position + 1}: the column reads {expected[position]}, not {(one, two)}")
        if carried != carry:
            raise StepError(f"step {position + 1}: the carry is {carry}, not {carried}")
        if total != one + two + carried or (carry_out, written) != divmod(total, 10):
            raise StepError(f"step {position + 1}: {line!r} adds up wrongly")
        carry = carry_out
    if len(lines) < len(expected):
        raise StepError(f"step {len(lines) + 1}: {len(expected) - len(lines)} columns are missing")


TASK = Task("addition", "position-exact reading and a carried bit", draw, check_steps)

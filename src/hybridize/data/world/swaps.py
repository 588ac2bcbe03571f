"""State tracking: people hold things and swap them; each step needs the newest holding of two people."""

import re
from random import Random

from hybridize.data.world.problem import Problem, StepError, Task
from hybridize.data.world.words import OBJECTS, PEOPLE

SIZES = {1: (3, 4), 2: (3, 6), 3: (4, 8), 4: (5, 11), 5: (5, 16), 6: (6, 24), 7: (7, 36), 8: (8, 84)}
"""(people, swaps) per level."""

_STEP = re.compile(r"(\w+) (\w+), (\w+) (\w+): (\w+) (\w+), (\w+) (\w+)")


def draw(rng: Random, level: int) -> Problem:
    """People with one object each, a series of swaps, and a question about one of them."""
    num_people, num_swaps = SIZES[level]
    people, objects = rng.sample(PEOPLE, num_people), rng.sample(OBJECTS, num_people)
    swaps = [tuple(rng.sample(range(num_people), 2)) for _ in range(num_swaps)]
    asked = rng.randrange(num_people)
    holdings = dict(zip(people, objects, strict=True))
    start = ", ".join(f"{person} {thing}" for person, thing in holdings.items())
    sentences, lines = [], []
    for a, b in swaps:
        one, two = people[a], people[b]
        sentences.append(f"{one} and {two} swap.")
        before = f"{one} {holdings[one]}, {two} {holdings[two]}"
        holdings[one], holdings[two] = holdings[two], holdings[one]
        lines.append(f"{before}: {one} {holdings[one]}, {two} {holdings[two]}")
    return Problem(
        task="swaps",
        level=level,
        question=f"Holding: {start}. {' '.join(sentences)} What does {people[asked]} hold?",
        thinking="\n".join(lines),
        answer=holdings[people[asked]],
        structure=f"{num_people}:" + ",".join(f"{a}{b}" for a, b in swaps) + f"?{asked}",
        facts={
            "start": dict(zip(people, objects, strict=True)),
            "swaps": [(people[a], people[b]) for a, b in swaps],
        },
    )


def check_steps(problem: Problem, lines: list[str]) -> None:
    """Each line must be the next swap with the right holdings before and after it; no swap may be missing."""
    holdings = dict(problem.facts["start"])
    swaps: list[tuple[str, str]] = problem.facts["swaps"]
    for position, line in enumerate(lines):
        if position >= len(swaps):
            raise StepError(f"step {position + 1}: there is no swap left, but it says {line!r}")
        match = _STEP.fullmatch(line)
        if not match:
            raise StepError(f"step {position + 1}: {line!r} is not a swap")
        words = match.groups()
        one, two = swaps[position]
        if (words[0], words[2]) != (one, two) or (words[4], words[6]) != (one, two):
            raise StepError(f"step {position + 1}: the swap is {one} and {two}, not {line!r}")
        if (words[1], words[3]) != (holdings[one], holdings[two]):
            raise StepError(
                f"step {position + 1}: before it {one} has the {holdings[one]}, {two} the {holdings[two]}; not {line!r}"
            )
        holdings[one], holdings[two] = holdings[two], holdings[one]
        if (words[5], words[7]) != (holdings[one], holdings[two]):
            raise StepError(
                f"step {position + 1}: after it {one} has the {holdings[one]}, {two} the {holdings[two]}; not {line!r}"
            )
    if len(lines) < len(swaps):
        raise StepError(f"step {len(lines) + 1}: {len(swaps) - len(lines)} swaps are missing")


TASK = Task("swaps", "tracking a state through many updates", draw, check_steps)

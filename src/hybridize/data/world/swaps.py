"""State tracking: people hold things and swap them; each step writes the whole state anew after one swap."""

import re
from random import Random

from hybridize.data.world.problem import Problem, StepError, Task
from hybridize.data.world.words import OBJECTS, PEOPLE

SIZES = {1: (3, 3), 2: (3, 5), 3: (4, 6), 4: (4, 9), 5: (5, 12), 6: (6, 16), 7: (7, 24), 8: (8, 44)}
"""(people, swaps) per level."""

_STEP = re.compile(r"(\w+) and (\w+): (\w+ \w+(?:, \w+ \w+)*)")


def draw(rng: Random, level: int) -> Problem:
    """People with one object each, a series of swaps, and a question about one of them."""
    num_people, num_swaps = SIZES[level]
    people, objects = rng.sample(PEOPLE, num_people), rng.sample(OBJECTS, num_people)
    swaps = [tuple(rng.sample(range(num_people), 2)) for _ in range(num_swaps)]
    asked = rng.randrange(num_people)
    holdings = dict(zip(people, objects, strict=True))
    start = _show(holdings)
    sentences, lines = [], []
    for a, b in swaps:
        one, two = people[a], people[b]
        sentences.append(f"{one} and {two} swap.")
        holdings[one], holdings[two] = holdings[two], holdings[one]
        lines.append(f"{one} and {two}: {_show(holdings)}")
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


def _show(holdings: dict[str, str]) -> str:
    return ", ".join(f"{person} {thing}" for person, thing in holdings.items())


def check_steps(problem: Problem, lines: list[str]) -> None:
    """Each line must name the next swap and the whole state after it; no swap may be missing."""
    holdings = dict(problem.facts["start"])
    swaps: list[tuple[str, str]] = problem.facts["swaps"]
    for position, line in enumerate(lines):
        where = f"step {position + 1}"
        if position >= len(swaps):
            raise StepError(f"{where}: there is no swap left, but it says {line!r}")
        match = _STEP.fullmatch(line)
        if not match:
            raise StepError(f"{where}: {line!r} is not a swap")
        one, two = swaps[position]
        if match.group(1, 2) != (one, two):
            raise StepError(f"{where}: the swap is {one} and {two}, not {match[1]} and {match[2]}")
        holdings[one], holdings[two] = holdings[two], holdings[one]
        if match[3] != _show(holdings):
            raise StepError(f"{where}: then the state is {_show(holdings)!r}, not {match[3]!r}")
    if len(lines) < len(swaps):
        raise StepError(f"step {len(lines) + 1}: {len(swaps) - len(lines)} swaps are missing")


TASK = Task("swaps", "tracking a state through many updates", draw, check_steps)

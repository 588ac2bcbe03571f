"""Recall: facts from earlier in a long context, looked up exactly and in the order asked."""

import re
from random import Random

from hybridize.data.world.problem import Problem, StepError, Task
from hybridize.data.world.words import draw_places

SIZES = {1: (6, 4), 2: (9, 5), 3: (13, 6), 4: (18, 6), 5: (28, 7), 6: (44, 8), 7: (72, 8), 8: (130, 8)}
"""(facts, lookups) per level."""

_STEP = re.compile(r"(\w+ \w+) (\d{3})")


def draw(rng: Random, level: int) -> Problem:
    """A list of places, each with a three-digit code, and some places to look up."""
    num_facts, num_lookups = SIZES[level]
    codes = {place: f"{rng.randrange(1000):03d}" for place in draw_places(rng, num_facts)}
    places = list(codes)
    asked = rng.sample(range(num_facts), num_lookups)
    wanted = [places[i] for i in asked]
    return Problem(
        task="recall",
        level=level,
        question="Codes: "
        + ", ".join(f"{place} {code}" for place, code in codes.items())
        + f". Which codes have {', '.join(wanted)}?",
        thinking="\n".join(f"{place} {codes[place]}" for place in wanted),
        answer=" ".join(codes[place] for place in wanted),
        structure=f"{num_facts}:" + ",".join(map(str, asked)),
        facts={"codes": codes, "wanted": wanted},
    )


def check_steps(problem: Problem, lines: list[str]) -> None:
    """Each line must look the next place up and quote its code; no place may be missing."""
    codes, wanted = problem.facts["codes"], problem.facts["wanted"]
    for position, line in enumerate(lines):
        if position >= len(wanted):
            raise StepError(f"step {position + 1}: nothing is left to look up, but it says {line!r}")
        match = _STEP.fullmatch(line)
        if not match:
            raise StepError(f"step {position + 1}: {line!r} is not a lookup")
        place, code = match.groups()
        if place != wanted[position]:
            raise StepError(f"step {position + 1}: {wanted[position]!r} is asked for, not {place!r}")
        if code != codes[place]:
            raise StepError(f"step {position + 1}: the code of the {place} is {codes[place]}, not {code}")
    if len(lines) < len(wanted):
        raise StepError(f"step {len(lines) + 1}: {len(wanted) - len(lines)} lookups are missing")


TASK = Task("recall", "exact retrieval from a long context", draw, check_steps)

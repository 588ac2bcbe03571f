"""State tracking: places hold codes and swap them; each step needs the newest code of two places."""

import re
from itertools import product
from random import Random

from hybridize.data.world.problem import Problem, StepError, Task
from hybridize.data.world.words import COLORS, PLACES

SIZES = {1: (4, 3), 2: (4, 4), 3: (4, 6), 4: (5, 8), 5: (5, 12), 6: (6, 18), 7: (7, 28), 8: (8, 44)}
"""(places, swaps) per level."""

_PLACES = [f"{color} {place}" for color, place in product(COLORS, PLACES)]
_HELD = r"(\w+ \w+) (\d{3})"
_STEP = re.compile(rf"{_HELD}, {_HELD}: {_HELD}, {_HELD}")


def draw(rng: Random, level: int) -> Problem:
    """Places with a code each, a series of swaps, and a question about one of the places."""
    num_places, num_swaps = SIZES[level]
    places = rng.sample(_PLACES, num_places)
    codes = [f"{code:03d}" for code in rng.sample(range(1000), num_places)]
    swaps = [(a, b) for a, b in (rng.sample(range(num_places), 2) for _ in range(num_swaps))]
    asked = rng.randrange(num_places)
    start = dict(zip(places, codes, strict=True))
    holdings = dict(start)
    sentences, lines = [], []
    for a, b in swaps:
        one, two = places[a], places[b]
        sentences.append(f"{one} and {two} swap.")
        lines.append(_step(holdings, one, two))
        holdings[one], holdings[two] = holdings[two], holdings[one]
    return Problem(
        task="swaps",
        level=level,
        question="Codes: "
        + ", ".join(f"{place} {code}" for place, code in start.items())
        + f". {' '.join(sentences)} Which code has {places[asked]}?",
        thinking="\n".join(lines),
        answer=holdings[places[asked]],
        structure=f"{num_places}:{canonical(swaps, asked)}",
        facts={"start": start, "swaps": [(places[a], places[b]) for a, b in swaps]},
    )


def canonical(swaps: list[tuple[int, int]], asked: int) -> str:
    """The swaps and the question up to a renaming of the places and to who is named first in a swap."""
    names: list[dict[int, int]] = [{}]  # every way to number places in the order in which swaps first name them
    for one, two in swaps:
        grown = []
        for known in names:
            fresh = [place for place in (one, two) if place not in known]
            for order in {tuple(fresh), tuple(reversed(fresh))}:
                grown.append(known | {place: len(known) + i for i, place in enumerate(order)})
        names = grown
    return min(
        ",".join("".join(sorted(str(known[place]) for place in pair)) for pair in swaps) + f"?{known.get(asked, '-')}"
        for known in names
    )


def _step(holdings: dict[str, str], one: str, two: str) -> str:
    """The line of thinking for a swap of two places, given the codes before it."""
    before = f"{one} {holdings[one]}, {two} {holdings[two]}"
    return f"{before}: {one} {holdings[two]}, {two} {holdings[one]}"


def check_steps(problem: Problem, lines: list[str]) -> None:
    """Each line must be the next swap with the right codes before and after it; no swap may be missing."""
    holdings = dict(problem.facts["start"])
    swaps: list[tuple[str, str]] = problem.facts["swaps"]
    for position, line in enumerate(lines):
        where = f"step {position + 1}"
        if position >= len(swaps):
            raise StepError(f"{where}: there is no swap left, but it says {line!r}")
        if not _STEP.fullmatch(line):
            raise StepError(f"{where}: {line!r} is not a swap")
        one, two = swaps[position]
        if line != (expected := _step(holdings, one, two)):
            raise StepError(f"{where}: the swap reads {expected!r}, not {line!r}")
        holdings[one], holdings[two] = holdings[two], holdings[one]
    if len(lines) < len(swaps):
        raise StepError(f"step {len(lines) + 1}: {len(swaps) - len(lines)} swaps are missing")


TASK = Task("swaps", "tracking a state through many updates", draw, check_steps)

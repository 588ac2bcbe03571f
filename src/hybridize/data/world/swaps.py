"""State tracking: places hold codes and swap them; each step needs the newest code of two places."""

from random import Random

from hybridize.data.world.problem import Problem, StepError, Task
from hybridize.data.world.words import draw_places

SIZES = {1: (4, 3), 2: (4, 4), 3: (4, 6), 4: (5, 8), 5: (5, 12), 6: (6, 18), 7: (7, 28), 8: (8, 44)}
"""(places, swaps) per level."""


def draw(rng: Random, level: int) -> Problem:
    """Places with a code each, a series of swaps, and a question about one of the places."""
    num_places, num_swaps = SIZES[level]
    places = draw_places(rng, num_places)
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
    lines.append(f"{places[asked]} {holdings[places[asked]]}")
    return Problem(
        task="swaps",
        level=level,
        question="Codes: "
        + ", ".join(f"{place} {code}" for place, code in start.items())
        + f". {' '.join(sentences)} Which code has {places[asked]}?",
        thinking="\n".join(lines),
        answer=holdings[places[asked]],
        structure=f"{num_places}:{canonical(swaps, asked)}",
        facts={"start": start, "swaps": [(places[a], places[b]) for a, b in swaps], "asked": places[asked]},
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
    """Each line must be the next swap with the right codes before and after it; the last one looks the answer up."""
    holdings = dict(problem.facts["start"])
    expected = []
    for one, two in problem.facts["swaps"]:
        expected.append(_step(holdings, one, two))
        holdings[one], holdings[two] = holdings[two], holdings[one]
    expected.append(f"{problem.facts['asked']} {holdings[problem.facts['asked']]}")
    for position, (line, right) in enumerate(zip(lines, expected, strict=False)):
        if line != right:
            raise StepError(f"step {position + 1}: it should read {right!r}, not {line!r}")
    if len(lines) < len(expected):
        raise StepError(f"step {len(lines) + 1}: {len(expected) - len(lines)} steps are missing")
    if len(lines) > len(expected):
        raise StepError(f"step {len(expected) + 1}: nothing is left to do, but it says {lines[len(expected)]!r}")


TASK = Task("swaps", "tracking a state through many updates", draw, check_steps)

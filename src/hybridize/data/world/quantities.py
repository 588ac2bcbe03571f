"""Word problems over a dependency graph of quantities, in the spirit of iGSM (arXiv 2407.20311).

Some quantities are given, the others defined by earlier ones; the statements come shuffled and some are beside
the point. The chain of thought walks down from the quantity asked for: it unfolds a definition, settles each
quantity that the definition needs, then computes it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from random import Random

from hybridize.data.world.problem import Problem, StepError, Task
from hybridize.data.world.words import COLORS, THINGS

SIZES = {1: (4, 3), 2: (5, 4), 3: (6, 5), 4: (8, 6), 5: (10, 8), 6: (13, 11), 7: (18, 16), 8: (22, 20)}
"""(quantities, of them needed for the answer) per level."""

MAX_VALUE = 99

_NAMES = [f"{color} {thing}" for color, thing in product(COLORS, THINGS)]


@dataclass(frozen=True)
class _Node:
    """A quantity: `given` a number, the `sum` of two others, or another one `more`, `less` or `times` a number."""

    op: str
    parents: tuple[int, ...] = ()
    number: int = 0

    def formula(self, operands: list[str]) -> str:
        """The definition's right-hand side over the parents' names or values."""
        if self.op == "given":
            return str(self.number)
        if self.op == "sum":
            return f"{operands[0]} + {operands[1]}"
        if self.op == "times":
            return f"{self.number} * {operands[0]}"
        return f"{operands[0]} {'+' if self.op == 'more' else '-'} {self.number}"

    def value(self, operands: list[int]) -> int:
        """The quantity's value, given the parents' values."""
        if self.op == "given":
            return self.number
        if self.op == "sum":
            return operands[0] + operands[1]
        if self.op == "times":
            return self.number * operands[0]
        return operands[0] + (self.number if self.op == "more" else -self.number)

    def sentence(self, operands: list[str]) -> str:
        """The definition's right-hand side in words."""
        if self.op == "given":
            return str(self.number)
        if self.op == "sum":
            return f"{operands[0]} plus {operands[1]}"
        if self.op == "times":
            return f"{self.number} times {operands[0]}"
        return f"{self.number} {'more' if self.op == 'more' else 'fewer'} than {operands[0]}"


def draw(rng: Random, level: int) -> Problem:
    """A graph whose answer needs exactly the level's number of quantities; values stay within 0..99."""
    num_nodes, num_needed = SIZES[level]
    nodes, values = _graph(rng, num_nodes, num_needed)
    names = rng.sample(_NAMES, num_nodes)
    definitions = {names[i]: node.sentence([names[p] for p in node.parents]) for i, node in enumerate(nodes)}
    statements = [f"{name} are {words}." for name, words in definitions.items()]
    rng.shuffle(statements)
    asked = num_needed - 1
    return Problem(
        task="quantities",
        level=level,
        question=" ".join(statements) + f" How many {names[asked]}?",
        thinking="\n".join(_steps(nodes, values, names, asked)),
        answer=str(values[asked]),
        structure=_canonical(nodes, asked),
        facts={
            "asked": names[asked],
            "definitions": definitions,
            "formulas": {names[i]: node.formula([names[p] for p in node.parents]) for i, node in enumerate(nodes)},
        },
    )


def _canonical(nodes: list[_Node], index: int) -> str:
    """The formula of a quantity down to given ones, without names and numbers; sums in sorted order."""
    node = nodes[index]
    parts = sorted(_canonical(nodes, parent) for parent in node.parents)
    return node.op if not parts else f"{node.op}({','.join(parts)})"


def _graph(rng: Random, num_nodes: int, num_needed: int) -> tuple[list[_Node], list[int]]:
    """A graph in topological order: the first `num_needed` are just those the last of them needs."""
    while True:
        nodes, values = _attempt_graph(rng, num_nodes, num_needed)
        if len(nodes) == num_nodes:
            return nodes, values


def _attempt_graph(rng: Random, num_nodes: int, num_needed: int) -> tuple[list[_Node], list[int]]:
    """Draw quantities one after another; stops short where none within bounds is found in a few tries."""
    num_given = max(1, round(num_needed * 0.35))
    nodes: list[_Node] = []
    values: list[int] = []
    unused: set[int] = set()  # needed quantities that nothing depends on yet
    tries_left = 4 * num_nodes
    while len(nodes) < num_nodes and tries_left:
        tries_left -= 1
        position = len(nodes)
        node = _draw_node(rng, position, num_given, num_needed, unused)
        value = node.value([values[p] for p in node.parents])
        if not 0 <= value <= MAX_VALUE:
            continue
        nodes.append(node)
        values.append(value)
        if position < num_needed:
            unused = (unused - set(node.parents)) | {position}
            if len(unused) > num_needed - position:  # too many loose ends to be joined by the last one
                break
    return nodes, values


def _draw_node(rng: Random, position: int, num_given: int, num_needed: int, unused: set[int]) -> _Node:
    if position < num_given or (position >= num_needed and rng.random() < 0.3):
        return _Node("given", (), rng.randrange(1, 20))
    earlier = range(min(position, num_needed))
    left = num_needed - position  # needed quantities still to come, this one included
    op = "sum" if len(unused) > left else rng.choice(("sum", "sum", "more", "less", "times"))
    loose = sorted(unused) if position < num_needed else []
    first = rng.choice(loose) if loose else rng.choice(earlier)
    if op == "sum":
        others = [p for p in (loose if len(unused) > left else earlier) if p != first]
        if not others:
            return _Node("more", (first,), rng.randrange(1, 20))
        pair = [first, rng.choice(others)]
        rng.shuffle(pair)
        return _Node("sum", tuple(pair))
    return _Node(op, (first,), rng.randrange(2, 6) if op == "times" else rng.randrange(1, 20))


def _steps(nodes: list[_Node], values: list[int], names: list[str], asked: int) -> Iterator[str]:
    settled: set[int] = set()

    def settle(index: int) -> Iterator[str]:
        node = nodes[index]
        settled.add(index)
        yield f"{names[index]} are {node.sentence([names[p] for p in node.parents])}"
        if node.op == "given":
            return
        for parent in node.parents:
            if parent not in settled:
                yield from settle(parent)
        yield f"{names[index]} = {node.formula([str(values[p]) for p in node.parents])} = {values[index]}"

    return settle(asked)


_COMPUTED = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")


def check_steps(problem: Problem, lines: list[str]) -> None:
    """Each line must quote a definition, or compute a quantity whose parts are known from lines before."""
    definitions: dict[str, str] = problem.facts["definitions"]
    known: dict[str, int] = {}
    for position, line in enumerate(lines):
        where = f"step {position + 1}"
        if " are " in line:
            name, _, words = line.partition(" are ")
            if words != definitions.get(name):
                raise StepError(f"{where}: {name} are {definitions.get(name, 'not in the problem')}, not {words!r}")
            if words.isdecimal():
                known[name] = int(words)
            continue
        name, _, claim = line.partition(" = ")
        if name not in definitions:
            raise StepError(f"{where}: {line!r} is about no quantity of the problem")
        known[name] = _check_sum(where, name, claim, problem.facts["formulas"][name], known)
    if problem.facts["asked"] not in known:
        raise StepError(f"step {len(lines) + 1}: {problem.facts['asked']} is never settled")


def _check_sum(where: str, name: str, claim: str, formula: str, known: dict[str, int]) -> int:
    """The value that a line computes for `name`, if it is the right one."""
    try:
        filled = re.sub(r"[a-z]+ [a-z]+", lambda part: str(known[part[0]]), formula)
    except KeyError as missing:
        raise StepError(f"{where}: {missing.args[0]} is not settled yet") from None
    match = _COMPUTED.fullmatch(claim)
    if not match or claim.rpartition(" = ")[0] != filled:
        raise StepError(f"{where}: {name} = {formula}, that is {filled}; not {claim!r}")
    left, sign, right, result = match.groups()
    if int(result) != _compute(int(left), sign, int(right)):
        raise StepError(f"{where}: {claim!r} is computed wrongly")
    return int(result)


def _compute(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right if sign == "-" else left * right


TASK = Task("quantities", "multi-step arithmetic over a graph of dependencies", draw, check_steps)

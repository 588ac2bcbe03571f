"""Conversations to train on, and prompts to be answered: from the reasoning world, a file, a data set of the hub.

Conversations come one after another without end; the i-th is a function of i, the spec and the seed alone,
whatever was read before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from random import Random

from hybridize.data.chat import Message
from hybridize.data.plain import is_plain, read_pieces
from hybridize.data.rows import parse_chat, parse_prompt
from hybridize.data.tables import Table, open_table
from hybridize.data.world import Problem, draw_problem
from hybridize.spec.data import FileDataSpec, HubDataSpec, WorldDataSpec

_SEED_STRIDE = 1_000_003  # prime: the data's seed and the caller's do not add up to the same draw

ReadableData = WorldDataSpec | FileDataSpec | HubDataSpec
"""What can be read as it is. The traces of a stage are read as the file that holds them."""


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with an assistant message, or a piece of plain text.

    Attributes:
        messages: at least two, each with `role` and `content`; none of plain text.
        place: where it comes from, for errors, e.g. `traces.jsonl:17`.
        epoch: how many times its source has been gone through when this pass is over; 1 at first.
        text: the plain text; None of a conversation.
    """

    messages: list[Message]
    place: str
    epoch: int
    text: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What a model is to answer.

    Attributes:
        messages: at least one, up to where the assistant is to answer.
        answer: the reference that an answer is compared with, if there is one.
        id: the row's own, or else where it comes from.
        place: where it comes from, for errors.
        problem: what the judge of the reasoning world needs, for one of its problems.
    """

    messages: list[Message]
    answer: str | None
    id: str
    place: str
    problem: Problem | None = None

    @property
    def text(self) -> str:
        """The last message, which is the one to be answered."""
        return self.messages[-1]["content"]


def iter_conversations(data: ReadableData, seed: int) -> Iterator[list[Message]]:
    """Conversations without end, each ending with an assistant message; plain text has no messages.

    Args:
        data: where they come from. The world gives training problems, tasks and levels in turn; a file or data set is
            gone through again and again, each time in another order.
        seed: of the world's problems (with the spec's own), or of the order.

    Raises:
        ValueError: at once, before the first conversation: the world has no such task, the data set cannot be loaded,
            or a row is not a conversation. Names the row, the column, the value and the remedy.
    """
    return (conversation.messages for conversation in iter_placed(data, seed))


def iter_placed(data: ReadableData, seed: int) -> Iterator[Conversation]:
    """As `iter_conversations`, with where each conversation comes from."""
    if isinstance(data, WorldDataSpec):
        return _iter_world(data, seed)
    if isinstance(data, FileDataSpec) and is_plain(data.path):
        return _iter_pieces(read_pieces(data.path), data.path, seed)
    table = open_table(data)
    for place, row in table.rows():
        parse_chat(row, place)  # now, not amid training
    return _iter_table(table, seed)


def read_prompts(data: ReadableData, num_prompts: int, seed: int) -> list[Prompt]:
    """Prompts from the start of the data, in its order; fewer if it has no more.

    Args:
        data: where they come from. Rows need no completion, and lose one that they have.
        num_prompts: how many.
        seed: of the world's problems, with the spec's own; it draws the problems that `iter_conversations` does.

    Raises:
        ValueError: the data cannot be loaded, or a row holds no prompt. Names the row, the column, the value and the
            remedy.
    """
    if isinstance(data, WorldDataSpec):
        drawn = islice(_draw(data, seed), num_prompts)
        return [Prompt(problem.messages[:1], problem.answer, id, place, problem) for problem, id, place in drawn]
    if isinstance(data, FileDataSpec) and is_plain(data.path):
        raise ValueError(f"{data.path}: plain text holds no prompts; give a file of chats, or the world")
    prompts = []
    for place, row in islice(open_table(data).rows(), num_prompts):
        messages, answer = parse_prompt(row, place)
        own = row.get("id")
        prompts.append(Prompt(messages, answer, place if own is None else str(own), place))
    return prompts


def check_first(data: FileDataSpec, *, prompts: bool = False) -> None:
    """Raise what reading a file would raise at its first row; quick, however long it is.

    Args:
        data: names the file.
        prompts: whether it is read for what to answer, rather than for whole conversations.

    Raises:
        ValueError: it cannot be read, holds nothing, or its first row is not what it should be.
    """
    if prompts:
        read_prompts(data, 1, 0)
    elif is_plain(data.path):
        read_pieces(data.path)
    else:
        place, row = next(open_table(data).rows())
        parse_chat(row, place)


def _iter_world(data: WorldDataSpec, seed: int) -> Iterator[Conversation]:
    problems = _draw(data, seed)
    return (Conversation(problem.messages, place, epoch=1) for problem, _, place in problems)


def _draw(data: WorldDataSpec, seed: int) -> Iterator[tuple[Problem, str, str]]:
    """Training problems without end, tasks and levels in turn, each with an id and a place."""
    cells = [(task, level) for level in data.levels for task in data.tasks]
    for task, level in cells:
        draw_problem(task, level, "train", 0)  # refuses an unknown task or level now
    return _draw_cells(cells, data.seed * _SEED_STRIDE + seed)


def _draw_cells(cells: list[tuple[str, int]], seed: int) -> Iterator[tuple[Problem, str, str]]:
    for i in count():
        index, cell = divmod(i, len(cells))
        task, level = cells[cell]
        problem = draw_problem(task, level, "train", index, seed)
        yield problem, f"world/{task}/{level}/{seed}/{index}", f"world {task} level {level} number {index}"


def _iter_pieces(pieces: list[str], name: str, seed: int) -> Iterator[Conversation]:
    for epoch in count(1):
        order = list(range(len(pieces)))
        Random(f"{seed}/{epoch}").shuffle(order)
        for number in order:
            yield Conversation([], f"{name}: piece {number + 1}", epoch, pieces[number])


def _iter_table(table: Table, seed: int) -> Iterator[Conversation]:
    for epoch in count(1):
        for place, row in table.rows(Random(f"{seed}/{epoch}")):
            yield Conversation(parse_chat(row, place), place, epoch)

"""Conversations to train on, one after another without end: from the reasoning world, or from a file.

The i-th conversation is a function of i, the spec and the seed alone, whatever was read before it.
"""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from hybridize.data.chat import Message
from hybridize.data.world import draw_problem
from hybridize.spec.data import FileDataSpec, WorldDataSpec

_SEED_STRIDE = 1_000_003  # prime: the data's seed and the caller's do not add up to the same draw
_FORMATS = '{"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with an assistant message.

    Attributes:
        messages: at least two, each with `role` and `content`.
        place: where it comes from, for errors, e.g. `traces.jsonl:17`.
        epoch: how many times its source has been gone through when this pass is over; 1 at first.
    """

    messages: list[Message]
    place: str
    epoch: int


def iter_conversations(data: WorldDataSpec | FileDataSpec, seed: int) -> Iterator[list[Message]]:
    """Conversations without end, each ending with an assistant message.

    Args:
        data: where they come from. The world gives training problems, tasks and levels in turn; a file is
            gone through again and again, each time in another order.
        seed: of the world's problems (with the spec's own), or of the file's order.

    Raises:
        ValueError: at once, before the first conversation: the world has no such task, or a line of the file
            is not a conversation. Names the line, the field, the value and the remedy.
    """
    return (conversation.messages for conversation in iter_placed(data, seed))


def iter_placed(data: WorldDataSpec | FileDataSpec, seed: int) -> Iterator[Conversation]:
    """As `iter_conversations`, with where each conversation comes from."""
    if isinstance(data, FileDataSpec):
        return _iter_file(Path(data.path), seed)
    cells = [(task, level) for level in data.levels for task in data.tasks]
    for task, level in cells:
        draw_problem(task, level, "train", 0)  # refuses an unknown task or level now, not amid training
    return _iter_world(cells, data.seed * _SEED_STRIDE + seed)


def parse_conversation(line: bytes, place: str) -> list[Message]:
    """Read one line of a JSON-lines file.

    Args:
        line: a JSON object with `messages`, or with `prompt` and `completion`; other keys are ignored.
        place: how to call the line in errors, e.g. `traces.jsonl:17`.

    Raises:
        ValueError: the line is not such an object; names the place, the field, the value and the remedy.
    """
    try:
        row = json.loads(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: it is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        text = _show(line.decode("utf-8").strip())
        raise ValueError(f"{place}: {text} is not JSON ({error}); write one JSON object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {_show(row)} is not an object; write {_FORMATS}")
    if "messages" in row:
        both = [key for key in ("prompt", "completion") if key in row]
        if both:
            raise ValueError(f"{place}: it has messages and {both[0]} as well; keep one of {_FORMATS}")
        return _check_messages(row["messages"], place)
    missing = [key for key in ("prompt", "completion") if key not in row]
    if missing:
        keys = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"{place}: {' and '.join(missing)} missing, keys are {_cut(keys)}; write {_FORMATS}")
    return [
        {"role": "user", "content": _check_text(row["prompt"], f"{place}: prompt")},
        {"role": "assistant", "content": _check_text(row["completion"], f"{place}: completion")},
    ]


def _iter_world(cells: list[tuple[str, int]], seed: int) -> Iterator[Conversation]:
    for i in count():
        index, cell = divmod(i, len(cells))
        task, level = cells[cell]
        messages = draw_problem(task, level, "train", index, seed).messages
        yield Conversation(messages, f"world {task} level {level} number {index}", epoch=1)


def _iter_file(path: Path, seed: int) -> Iterator[Conversation]:
    begins, numbers = _check_file(path)
    return _iter_lines(path, begins, numbers, seed)


def _iter_lines(path: Path, begins: array, numbers: array, seed: int) -> Iterator[Conversation]:
    with path.open("rb") as file:
        for epoch in count(1):
            order = list(range(len(begins)))
            Random(f"{seed}/{epoch}").shuffle(order)
            for i in order:
                file.seek(begins[i])
                place = f"{path}:{numbers[i]}"
                yield Conversation(parse_conversation(file.readline(), place), place, epoch)


def _check_file(path: Path) -> tuple[array, array]:
    """Read a whole file once, line by line; where its conversations begin, and the numbers of their lines."""
    begins, numbers, position = array("q"), array("q"), 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    mark = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
                    parse_conversation(line[mark:], f"{path}:{number}")
                    begins.append(position + mark)
                    numbers.append(number)
                position += len(line)
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read ({error.strerror}); check the path") from None
    if not begins:
        raise ValueError(f"{path}: it holds no conversation; write one a line, as {_FORMATS}")
    return begins, numbers


def _check_messages(messages: Any, place: str) -> list[Message]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(
            f"{place}: messages: {_show(messages)} is not a list of at least two messages; "
            "write the user's message and the assistant's"
        )
    checked = []
    for i, message in enumerate(messages):
        where = f"{place}: messages[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f'{where}: {_show(message)} is no message; write {{"role": ..., "content": ...}}')
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"{where}.{key}: missing in {_show(message)}; add it")
        checked.append({key: _check_text(message[key], f"{where}.{key}") for key in ("role", "content")})
    if checked[-1]["role"] != "assistant":
        raise ValueError(
            f"{place}: messages[{len(checked) - 1}].role: {_show(checked[-1]['role'])} is last; "
            "end with the assistant's message, which is what is trained on"
        )
    return checked


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {_show(value)} is not text; write a string")
    if not value.strip():
        raise ValueError(f"{where}: {_show(value)} is empty; fill it in, or remove the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {_show(value)} holds half a character; write valid Unicode") from None
    return value


def _show(value: Any) -> str:
    return _cut(ascii(value) if isinstance(value, str) else repr(value))


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."

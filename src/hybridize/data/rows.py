"""One row of a data set: from plain data, as a file holds it, to a chat or to a prompt with its reference answer.

Whatever the file's format, a fault is told in the same way: place, column, value and remedy.
"""

import json
from collections.abc import Mapping
from typing import Any

from hybridize.data.chat import Message

FORMATS = '{"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'
PROMPT_FORMATS = '{"prompt": ..., "answer": ...} or {"messages": [{"role": ..., "content": ...}, ...], "answer": ...}'
COLUMNS = ("messages", "prompt", "completion", "answer", "id")
"""What is read of a row; everything else is ignored."""

Row = Mapping[str, Any]


def parse_json(line: bytes, place: str) -> dict[str, Any]:
    """Read one line of a JSON-lines file.

    Args:
        line: a JSON object.
        place: how to call the line in errors, e.g. `traces.jsonl:17`.

    Raises:
        ValueError: the line is no JSON object.
    """
    try:
        row = json.loads(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: it is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        text = _show(line.decode("utf-8").strip())
        raise ValueError(f"{place}: {text} is not JSON ({error}); write one JSON object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {_show(row)} is not an object; write {FORMATS}")
    return row


def parse_chat(row: Row, place: str) -> list[Message]:
    """The chat that a row holds, for training: it ends with an assistant message.

    Args:
        row: with `messages`, or with `prompt` and `completion`, each of them text or a list of messages. It may have
            all three if they say the same. A null is the same as nothing.
        place: how to call the row in errors, e.g. `traces.jsonl:17`.

    Raises:
        ValueError: names the place, the column, the value and the remedy.
    """
    messages = _messages_of(row, place, needs_completion=True)
    if len(messages) < 2:
        raise ValueError(
            f"{place}: messages: {_show(messages)} is not a list of at least two messages; "
            "write the user's message and the assistant's"
        )
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{place}: messages[{len(messages) - 1}].role: {_show(messages[-1]['role'])} is last; "
            "end with the assistant's message, which is what is trained on"
        )
    return messages


def parse_prompt(row: Row, place: str) -> tuple[list[Message], str | None]:
    """What a row asks, and the reference answer if it has one.

    Args:
        row: as for `parse_chat`, but no answer is needed: an assistant message at the end is left out. The key
            `answer`, text or a number, is the reference.
        place: how to call the row in errors.

    Returns:
        Messages up to where the assistant is to answer, and the reference or None.

    Raises:
        ValueError: names the place, the column, the value and the remedy.
    """
    messages = _messages_of(row, place, needs_completion=False)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"{place}: messages: there is none before the assistant's; write the user's message first")
    return messages, _answer_of(row, place)


def _messages_of(row: Row, place: str, *, needs_completion: bool) -> list[Message]:
    formats = FORMATS if needs_completion else PROMPT_FORMATS
    if row.get("messages") is not None:
        messages = _check_messages(row["messages"], f"{place}: messages")
        _check_agreement(row, messages, place, formats)
        return messages
    needed = ("prompt", "completion") if needs_completion else ("prompt",)
    missing = [key for key in needed if row.get(key) is None]
    if missing:
        keys = ", ".join(repr(key) for key, value in row.items() if value is not None) or "none"
        raise ValueError(f"{place}: {' and '.join(missing)} missing, keys are {_cut(keys)}; write {formats}")
    messages = _as_messages(row["prompt"], "user", f"{place}: prompt")
    if needs_completion:
        messages += _as_messages(row["completion"], "assistant", f"{place}: completion")
    return messages


def _check_agreement(row: Row, messages: list[Message], place: str, formats: str) -> None:
    """A row may tell its chat twice, as traces do, but not in two ways."""
    said = {
        "prompt": [message["content"] for message in messages if message["role"] != "assistant"],
        "completion": [messages[-1]["content"]],
    }
    for key, contents in said.items():
        text = row.get(key)
        if isinstance(text, str) and text not in contents:
            raise ValueError(
                f"{place}: it has messages and {key} as well, and the {key} {_show(text)} is none of the messages; "
                f"keep one of {formats}"
            )


def _as_messages(value: Any, role: str, where: str) -> list[Message]:
    """A column that is text, or, as some data sets have it, a list of messages."""
    if isinstance(value, list):
        return _check_messages(value, where)
    return [{"role": role, "content": _check_text(value, where)}]


def _check_messages(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: {_show(messages)} is not a list of at least two messages; "
            "write the user's message and the assistant's"
        )
    checked = []
    for i, message in enumerate(messages):
        here = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f'{here}: {_show(message)} is no message; write {{"role": ..., "content": ...}}')
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"{here}.{key}: missing in {_show(message)}; add it")
        checked.append({key: _check_text(message[key], f"{here}.{key}") for key in ("role", "content")})
    return checked


def _answer_of(row: Row, place: str) -> str | None:
    answer = row.get("answer")
    if answer is None:
        return None
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    return _check_text(answer, f"{place}: answer")


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

"""The base of every spec: frozen, strict about unknown keys, and with errors a person can act on."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Spec(BaseModel):
    """A frozen description of something that can be asked for; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StoppedError(RuntimeError):
    """Work was stopped because going on makes no sense; the message says where, why and what to try."""


def choose(place: str, value: str, options: Iterable[str]) -> str:
    """Return `value` if it is one of `options`; else raise a `ValueError` naming the nearest ones."""
    known = list(options)
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{place}: {value!r} is unknown; use one of {', '.join(known)}{hint}")


def explain(error: ValidationError, root: str, fields: Iterable[str] = (), tags: Iterable[str] = ()) -> str:
    """Turn pydantic's report into one line per fault: place, value and remedy.

    Args:
        error: what pydantic raised.
        root: the name of the whole, e.g. `recipe` or the file it came from.
        fields: every key that would have been known, for the suggestion on a misspelt one.
        tags: kinds of variants, which pydantic adds to a fault's place and no reader would find in a file.

    Returns:
        Lines such as `recipe.stages[1].num_lyers: unknown key; did you mean 'num_layers'?`.
    """
    known, kinds = sorted(set(fields)), set(tags)
    faults = error.errors(include_url=False)
    places = [fault["loc"] for fault in faults]
    lines = []
    for fault in faults:
        location = fault["loc"]
        if fault["type"] == "too_short" and any(_is_below(place, location) for place in places):
            continue  # pydantic does not count faulty items, and says so once more
        is_key = fault["type"] in ("extra_forbidden", "missing")
        end = location[-1:] if is_key else ()
        inner = location[: len(location) - len(end)]
        place = root + _path(_without_tags(inner, kinds) + end)
        lines.append(_explain_fault(dict(fault), place, known))
    return "\n".join(lines)


def _explain_fault(fault: dict[str, Any], place: str, known: list[str]) -> str:
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    key = context.get("discriminator", "").strip("'")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        return f"{place}: unknown key; " + (f"did you mean {near[0]!r}?" if near else "remove it")
    if kind == "missing":
        return f"{place}: required, but missing; add it"
    if kind == "union_tag_not_found":
        return f"{place}: its kind is missing; add {key}"
    if kind == "union_tag_invalid":
        options = context["expected_tags"].replace("'", "").split(", ")
        try:
            choose(f"{place}.{key}", str(context["tag"]), options)
        except ValueError as unknown:
            return str(unknown)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{place}: {_show(value)} is not a mapping; write keys and values"
    if kind == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        named = _PLACE.match(message)
        if named:  # the validator names the place below this one, or this one once more
            last = place[place.rfind(".") + 1 :]
            return place + message[len(last) :] if named[1] == last else f"{place}.{message}"
        if isinstance(value, Mapping):  # the validator looked at the whole, which says nothing when repeated
            return f"{place}: {message}"
        return f"{place}: {_show(value)} is not accepted: {message}"
    return f"{place}: {_show(value)} is not accepted: {fault['msg']}"


_PLACE = re.compile(r"([a-z_]+)((\[\d+\])|(\.\w+))*: ")


def _is_below(place: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(place) > len(other) and place[: len(other)] == other


def _without_tags(location: tuple[int | str, ...], kinds: set[str]) -> tuple[int | str, ...]:
    """Leave out the kinds of variants; a key that is called like one stands right behind its variant's kind."""
    kept: list[int | str] = []
    behind_tag = False
    for part in location:
        behind_tag = part in kinds and not behind_tag
        if not behind_tag:
            kept.append(part)
    return tuple(kept)


def _path(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)


def _show(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

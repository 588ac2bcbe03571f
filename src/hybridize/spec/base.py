"""The base of every spec: frozen, strict about unknown keys, and with errors a person can act on."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Spec(BaseModel):
    """A frozen description of something that can be asked for; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def choose(place: str, value: str, options: Iterable[str]) -> str:
    """Return `value` if it is one of `options`; else raise a `ValueError` naming the nearest ones."""
    known = list(options)
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{place}: {value!r} is unknown; use one of {', '.join(known)}{hint}")


def explain(error: ValidationError, root: str, fields: Iterable[str] = ()) -> str:
    """Turn pydantic's report into one line per fault: place, value and remedy.

    Args:
        error: what pydantic raised.
        root: the name of the whole, e.g. `recipe` or the file it came from.
        fields: every key that would have been known, for the suggestion on a misspelt one.

    Returns:
        Lines such as `recipe.stages[1].num_lyers: unknown key; did you mean 'num_layers'?`.
    """
    known = sorted(set(fields))
    lines = []
    for fault in error.errors(include_url=False):
        place = root + _path(fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            lines.append(f"{place}: unknown key; " + (f"did you mean {near[0]!r}?" if near else "remove it"))
        elif fault["type"] == "missing":
            lines.append(f"{place}: required, but missing; add it")
        elif fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
            tags = fault.get("ctx", {}).get("expected_tags", "")
            lines.append(f"{place}: its kind is missing or unknown (got {_show(fault['input'])}); use {tags}")
        else:
            lines.append(f"{place}: {_show(fault['input'])} is not accepted: {fault['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _path(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)


def _show(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

"""Checkpoints that can be trusted: a folder counts once `complete.json`, written last, lists its files.

The Trainer writes a checkpoint file by file into its final folder, and a kill may come between any two. So
the mark is added, atomically, after the last; a folder without it, or with a file of another size than it
lists, is as good as absent.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from hybridize.files import write_whole

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in a run's folder."""

_MARK = "complete.json"
_NUM_KEPT = 2


def mark_complete(folder: Path, identity: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, once everything else is written.

    Args:
        folder: `checkpoint-<step>`.
        identity: what the run is; see `find_checkpoint`.
    """
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != _MARK:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            files[str(file.relative_to(folder))] = file.stat().st_size
    mark = {"step": step_of(folder), "identity": identity, "files": files}
    write_whole(folder / _MARK, json.dumps(mark, indent=2))


def keep_last(folder: Path) -> None:
    """Remove all complete checkpoints but the last two."""
    for old in _complete(folder)[:-_NUM_KEPT]:
        _remove(old)


def find_checkpoint(folder: Path, identity: dict[str, Any]) -> Path | None:
    """The last complete checkpoint of a run.

    Args:
        folder: of the run's checkpoints; need not exist.
        identity: settings and data that decide the run's course.

    Raises:
        ValueError: the checkpoint belongs to a run of other settings or data.
    """
    complete = _complete(folder)
    if not complete:
        return None
    theirs = _read_mark(complete[-1])["identity"]
    changed = [
        f"{key} (was {theirs.get(key)!r}, is {identity.get(key)!r})"
        for key in sorted(theirs.keys() | identity.keys())
        if theirs.get(key) != identity.get(key)
    ]
    if changed:
        raise ValueError(
            f"{complete[-1]}: it belongs to a run with another {', '.join(changed)}; remove {folder} to "
            "start afresh, or put the old values back to go on"
        )
    return complete[-1]


def remove_incomplete(folder: Path) -> None:
    """Remove checkpoints that were being written, or removed, when the run was killed."""
    complete = set(_complete(folder))
    for other in folder.glob("checkpoint-*"):
        if other not in complete:
            _remove(other)


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint, of whatever run."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [child for child in folder.glob("checkpoint-*") if _is_complete(child)]
    return sorted(found, key=step_of)


def _is_complete(folder: Path) -> bool:
    try:
        files = _read_mark(folder)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _read_mark(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _MARK).read_text(encoding="utf-8"))


def _remove(folder: Path) -> None:
    (folder / _MARK).unlink(missing_ok=True)  # first: what is half removed must not count
    shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(folder.name.rpartition("-")[2])

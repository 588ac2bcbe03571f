"""Files that appear whole or not at all: the one way in which anything here replaces a file."""

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it: a reader sees the old content or the new.

    The content has reached the disk before the name does. A failed write leaves the old file, and no other.

    Args:
        path: of the file; its folder is made if it is missing.
        content: text, written as UTF-8, or bytes.

    Raises:
        OSError: the disk is full, or may not be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise

"""The metrics of a training run on disk: one JSON line per step, none lost or doubled by a kill."""

import json
import os
from pathlib import Path
from typing import Any

from hybridize.files import write_whole

METRICS = "metrics.jsonl"
"""The metrics file in a run's folder."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that was cut short by a kill is left out.

    Args:
        path: of the file; there is nothing in it if it does not exist.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is incomplete


class MetricsFile:
    """Appends records to a file.

    Args:
        path: of the file.
        last_step: steps after this one are removed first: the resumed run does them again.
        writes: whether this process is the one that writes; the others only remember.
    """

    def __init__(self, path: Path, last_step: int, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.records = [record for record in read_metrics(path) if record["step"] <= last_step]
        if not writes:
            return
        write_whole(path, "".join(map(_line, self.records)))

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; it is on disk when this returns, as far as a killed process is concerned."""
        self.records.append(record)
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def sync(self) -> None:
        """Wait until all records have reached the disk itself."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"

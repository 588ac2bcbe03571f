"""Rows of files and data sets, in their own order or in another each time: JSON lines, Parquet, the hub's formats.

A table is opened once, says how many rows it has, and gives each as (place, plain data), the place being what errors
call it. None is held in memory as a whole: JSON lines are read by their offsets, Parquet by its row groups, and the
`datasets` library maps its files into memory.
"""

from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Protocol

from hybridize.data.rows import COLUMNS, FORMATS, parse_json
from hybridize.spec.data import FileDataSpec, HubDataSpec

_PARQUET_MAGIC = b"PAR1"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BATCH_ROWS = 256  # of Parquet turned into Python objects at a time


class Table(Protocol):
    """Some rows, of which one may ask again and again.

    Attributes:
        name: what errors call the whole.
    """

    name: str

    def __len__(self) -> int:
        """Number of rows."""

    def rows(self, order: Random | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every row once, with its place; in the table's order, or shuffled by a source of chance."""


def open_table(data: FileDataSpec | HubDataSpec) -> Table:
    """Open what a spec names.

    Raises:
        ValueError: it cannot be read, is of another format, has no rows or no column to read; names it and the remedy.
    """
    table: Table
    if isinstance(data, HubDataSpec):
        table = HubTable(data)
    else:
        table = ParquetFile(Path(data.path)) if _is_parquet(Path(data.path)) else JsonLines(Path(data.path))
    if not len(table):
        raise ValueError(f"{table.name}: it holds no conversation; write one a row, as {FORMATS}")
    return table


class JsonLines:
    """A file with a JSON object a line; empty lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._begins, self._numbers, position = array("q"), array("q"), 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip().removeprefix(_BYTE_ORDER_MARK):
                        mark = len(_BYTE_ORDER_MARK) if number == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
                        self._begins.append(position + mark)
                        self._numbers.append(number)
                    position += len(line)
        except OSError as error:
            raise _unreadable(path, error) from None

    def __len__(self) -> int:
        """Number of lines that are not empty."""
        return len(self._begins)

    def rows(self, order: Random | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every line once."""
        with self._path.open("rb") as file:
            for i in _ordered(len(self), order):
                file.seek(self._begins[i])
                place = f"{self._path}:{self._numbers[i]}"
                yield place, parse_json(file.readline(), place)


class ParquetFile:
    """A Parquet file. Shuffled, its row groups come in another order, and the rows within each."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name = str(path)
        self._path = path
        try:
            with pq.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
                names = file.schema_arrow.names
        except OSError as error:
            raise _unreadable(path, error) from None
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: it is no whole Parquet file ({_reason(error)}); write it anew") from None
        self._columns = [name for name in names if name in COLUMNS]
        self._groups = groups
        _check_columns(self.name, self._columns, names)

    def __len__(self) -> int:
        """Number of rows."""
        return sum(self._groups)

    def rows(self, order: Random | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every row once."""
        import pyarrow.parquet as pq

        begins = [sum(self._groups[:i]) for i in range(len(self._groups))]
        with pq.ParquetFile(self._path) as file:
            for group in _ordered(len(self._groups), order):
                table = file.read_row_group(group, columns=self._columns)
                numbers = list(_ordered(table.num_rows, order))
                for at in range(0, len(numbers), _BATCH_ROWS):
                    chosen = numbers[at : at + _BATCH_ROWS]
                    for number, row in zip(chosen, table.take(chosen).to_pylist(), strict=True):
                        yield f"{self._path} row {begins[group] + number}", row


class HubTable:
    """A data set that the `datasets` library knows: on the hub, in its cache, or in a folder."""

    def __init__(self, spec: HubDataSpec) -> None:
        self.name = f"{spec.dataset} {spec.split}"
        rows = _load_dataset(spec)
        names = list(rows.column_names)
        for key, column in spec.columns.items():
            if column not in names:
                raise ValueError(
                    f"{self.name}: columns.{key}: there is no column {column!r}; use one of {', '.join(names)}"
                )
        wanted: Mapping[str, str] = {name: name for name in COLUMNS if name in names} | dict(spec.columns)
        if spec.columns and "messages" not in spec.columns and "prompt" in spec.columns:
            wanted = {key: column for key, column in wanted.items() if key != "messages"}  # the prompt was chosen
        self._columns = wanted
        _check_columns(self.name, list(wanted), names)
        self._rows = rows.select_columns(sorted(set(wanted.values())))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def rows(self, order: Random | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every row once."""
        for i in _ordered(len(self), order):
            row = self._rows[i]
            yield f"{self.name} row {i}", {key: row[column] for key, column in self._columns.items()}


def _load_dataset(spec: HubDataSpec) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = Path(spec.dataset)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            saved = load_from_disk(spec.dataset)  # what `save_to_disk` wrote, which `load_dataset` refuses
            return saved[spec.split] if isinstance(saved, DatasetDict) else saved
        return load_dataset(spec.dataset, spec.config, split=spec.split, revision=spec.revision)
    except Exception as error:  # the library raises whatever is underneath: network, files, parsers
        wanted = "".join(
            f", {name} {value!r}"
            for name, value in (("config", spec.config), ("split", spec.split), ("revision", spec.revision))
            if value is not None
        )
        remedy = (
            "see that it holds data files of a kind that the datasets library reads"
            if folder.is_dir()
            else "check the name and the network, or download it and give its folder"
        )
        raise ValueError(
            f"data set {spec.dataset!r}{wanted}: it cannot be loaded ({type(error).__name__}: {_reason(error)}); "
            f"{remedy}"
        ) from None


def _is_parquet(path: Path) -> bool:
    if path.suffix == ".parquet":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
    except OSError:
        return False  # the reader says so


def _check_columns(name: str, columns: list[str], names: list[str]) -> None:
    if not {"messages", "prompt"} & set(columns):
        raise ValueError(
            f"{name}: it has neither a column messages nor prompt, columns are {', '.join(names) or 'none'}; "
            "rename one, or, for a data set, say which in columns"
        )


def _unreadable(path: Path, error: OSError) -> ValueError:
    reason = error.strerror or _reason(error)
    return ValueError(f"{path}: it cannot be read ({reason}); check the path")


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or "no reason given"


def _ordered(size: int, order: Random | None) -> range | list[int]:
    if order is None:
        return range(size)
    numbers = list(range(size))
    order.shuffle(numbers)
    return numbers

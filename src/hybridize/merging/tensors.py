"""Tensors of a checkpoint on disk, read one at a time; and the shards of the one to be written."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybridize.files import write_whole
from hybridize.models.checkpoint import check_files, weight_files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class StoredTensors:
    """The tensors of a folder's safetensors files.

    Attributes:
        folder: where they are.
        shapes: of every tensor, by name, in the order of the files.

    Raises:
        ValueError: a file is missing or damaged; names it and the remedy.
    """

    def __init__(self, folder: Path) -> None:
        check_files(folder)
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                    self._files[name] = file

    @contextmanager
    def read(self, name: str) -> Iterator[Tensor]:
        """A tensor, which may lie in the mapped file; not to be kept.

        The file is opened for each tensor anew: pages of a mapped file count as the process's memory until it is
        closed, so that one opened once would end up in memory whole.
        """
        with _opened(self._files[name]) as opened:
            yield opened.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file}: it cannot be read any more ({error}); fetch or write the checkpoint again") from None


@dataclass(frozen=True)
class Shard:
    """A file of weights to be written.

    Attributes:
        file: its name.
        names: of its tensors.
    """

    file: str
    names: tuple[str, ...]


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[Shard]:
    """Spread tensors over files, in order, each of at most `max_bytes` unless a single tensor is larger.

    Args:
        sizes: bytes of every tensor, by name.
        max_bytes: of tensors in a file.

    Returns:
        The files, called as transformers calls them.
    """
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    return [Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def write_index(folder: Path, shards: list[Shard], num_bytes: int, num_parameters: int) -> None:
    """Write the index that says which file holds which tensor."""
    weight_map = {name: shard.file for shard in shards for name in shard.names}
    content = {
        "metadata": {"total_parameters": num_parameters, "total_size": num_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_whole(folder / INDEX, json.dumps(content, indent=2) + "\n")

"""Checkpoints on disk, handled tensor by tensor: read one at a time, write one file's at a time."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridize.files import write_whole
from hybridize.models.checkpoint import check_files, weight_files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

Progress = Callable[[int, int], None]
"""Called with (tensors done, all tensors)."""

# What goes along with weights and config as it lies. Modelling code does not: it goes with one format only.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)


class StoredTensors:
    """The tensors of a folder's safetensors files.

    Attributes:
        folder: where they are.
        metas: a tensor without data for each, by name in the order of the files: its shape and dtype.

    Raises:
        ValueError: a file is missing or damaged, or two hold a tensor of one name; names it and the remedy.
    """

    def __init__(self, folder: Path) -> None:
        check_files(folder)
        self.folder = folder
        self.metas: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    if name in self._files:
                        raise ValueError(
                            f"{file}: tensor {name} is in {self._files[name].name} as well; fetch the checkpoint again"
                        )
                    self.metas[name] = opened.get_tensor(name).to("meta")
                    self._files[name] = file

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: tuple(meta.shape) for name, meta in self.metas.items()}

    @contextmanager
    def read(self, name: str) -> Iterator[Tensor]:
        """A tensor, which may lie in the mapped file; not to be kept.

        The file is opened for each tensor anew: pages of a mapped file count as the process's memory until it is
        closed, so that one opened once would end up in memory whole.
        """
        with _opened(self._files[name]) as opened:
            yield opened.get_tensor(name)

    def copy(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A copy of a tensor, or of its rows from the first to before the second."""
        with _opened(self._files[name]) as opened:
            tensor: Tensor = opened.get_tensor(name) if rows is None else opened.get_slice(name)[slice(*rows)]
            return tensor.clone()


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


def write_tensors(
    folder: Path,
    metas: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    max_shard_bytes: int,
    on_progress: Progress | None = None,
) -> dict[str, int]:
    """Write tensors as safetensors, with an index where there are several files, holding one file's at a time.

    Args:
        folder: to write into.
        metas: shape and dtype of every tensor to be written, by name.
        make: makes the tensor of a name.
        max_shard_bytes: of a file.
        on_progress: called after each tensor.

    Returns:
        `num_tensors`, `num_parameters`, `num_bytes` and `num_shards`.
    """
    shards = plan_shards({name: meta.nbytes for name, meta in metas.items()}, max_shard_bytes)
    done = 0
    for shard in shards:
        tensors: dict[str, Tensor] = {}
        for name in shard.names:
            tensors[name] = make(name)
            done += 1
            if on_progress:
                on_progress(done, len(metas))
        save_file(tensors, folder / shard.file, metadata={"format": "pt"})
        _let_others_read(folder / shard.file)
        del tensors
    counts = {
        "num_tensors": len(metas),
        "num_parameters": sum(meta.numel() for meta in metas.values()),
        "num_bytes": sum(meta.nbytes for meta in metas.values()),
        "num_shards": len(shards),
    }
    if len(shards) > 1:
        weight_map = {name: shard.file for shard in shards for name in shard.names}
        totals = {"total_parameters": counts["num_parameters"], "total_size": counts["num_bytes"]}
        index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
        write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return counts


def copy_companions(source: Path, target: Path, *more: str) -> None:
    """Copy what goes along with weights: tokenizer, chat template, generation config, licence.

    Args:
        source: folder of a checkpoint.
        target: folder to copy into.
        *more: names or patterns of further files.
    """
    for pattern in (*more, *_COMPANIONS):
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def make_folder(target: Path, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Work in a hidden sibling of a folder, then give it its name: it appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        partial.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
        counts = work(partial)
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


def _let_others_read(file: Path) -> None:
    """Give a file the permissions of any other: safetensors makes it private."""
    file.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

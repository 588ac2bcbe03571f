"""Make one checkpoint of several, holding no more than one shard of the result in memory."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.merging.layouts import check_same_configs, check_same_tensors
from hybridize.merging.methods import METHODS, Method, chunks, wide
from hybridize.models import check_output
from hybridize.models.stored import StoredTensors, copy_companions, make_folder, write_tensors
from hybridize.spec.base import choose

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def merge(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    density: float = 0.2,
    max_shard_bytes: int = 5_000_000_000,
    into: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Merge checkpoints of one layout.

    Computed in fp32, tensor by tensor; each gets the first source's dtype. A tensor that is the same in all sources
    is copied bit for bit by every method (there is nothing to average, and for `ties` nothing that could interfere,
    so it is not trimmed). The config, the tokenizer and the chat template are the first source's.

    Args:
        sources: folders of the models, two or more; two for `slerp`.
        out: the folder to make. It must not exist, or be empty, and appears whole or not at all.
        method: one of `METHODS`, see `hybridize.merging.methods`.
        weights: of each source, at least 0; divided by their sum. Equal by default. For `slerp`, the second one's
            share is how far to go.
        base: folder of the model which all sources started from; for `ties` only.
        density: share of each tensor's differences that `ties` keeps, in (0, 1].
        max_shard_bytes: of a safetensors file; also about what is held in memory.
        into: write into the folder `out`, which the caller owns and gives its name when it is done; of what is there,
            only older weights and what is copied beside them is replaced.
        on_progress: called with (tensors done, all tensors).

    Returns:
        `method`, `weights` (which sum to 1), `num_tensors`, `num_identical` (copied), `num_parameters`, `num_bytes`,
        `num_shards`, `seconds`, and what the method counted: `slerp`'s `num_linear` (tensors for which it fell
        back), `ties`' `num_kept` and `num_conflicts` (entries).

    Raises:
        ValueError: an option is out of range, `out` is not empty, a file is missing or damaged, the layouts, configs
            or tensors differ, or a tensor holds NaN. Names the place, the values and the remedy.
        OSError: the disk is full, or may not be written to.
    """
    started = time.perf_counter()
    folders = [Path(source) for source in sources]
    recipe, shares = _check_options(len(folders), method, weights, base, density, max_shard_bytes)
    inputs = [*folders, *([Path(base)] if base is not None else [])]
    out = Path(out)
    _check_out(out, inputs, into)
    check_same_configs(inputs)
    models = [StoredTensors(folder) for folder in inputs]
    check_same_tensors(models)

    def work(folder: Path) -> dict[str, Any]:
        return _write(folder, models, recipe, shares, density, max_shard_bytes, on_progress)

    stats = _fill(out, work) if into else make_folder(out, work)
    return {"method": method, "weights": list(shares), **stats, "seconds": time.perf_counter() - started}


def _check_options(
    num_sources: int,
    method: str,
    weights: Sequence[float] | None,
    base: str | Path | None,
    density: float,
    max_shard_bytes: int,
) -> tuple[Method, tuple[float, ...]]:
    """The method's row, and the weights divided by their sum."""
    recipe = METHODS[choose("method", method, METHODS)]
    if num_sources < 2 or recipe.num_sources not in (None, num_sources):
        wanted = recipe.num_sources or "two or more"
        raise ValueError(f"sources: {num_sources} given, but {method} merges {wanted}; give as many")
    given = tuple(weights) if weights is not None else (1.0,) * num_sources
    if len(given) != num_sources:
        raise ValueError(f"weights: {len(given)} for {num_sources} sources; give one for each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or sum(given) <= 0:
        raise ValueError(f"weights: {list(given)}: none may be negative, and one must be above 0; change them")
    if recipe.needs_base != (base is not None):
        remedy = "give the common starting point of its sources" if recipe.needs_base else "leave it out"
        raise ValueError(f"base: {method} takes {'one' if recipe.needs_base else 'none'}; {remedy}")
    if not 0 < density <= 1:
        raise ValueError(f"density: {density} is out of range; use a share above 0, at most 1")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: {max_shard_bytes} is out of range; use a number of bytes above 0")
    return recipe, tuple(weight / sum(given) for weight in given)


def _check_out(out: Path, inputs: Sequence[Path], into: bool) -> None:
    if not into:
        check_output(out)
    elif not out.is_dir():
        raise ValueError(f"{out}: there is no such folder to write into; make it first")
    elif out.resolve() in [folder.resolve() for folder in inputs]:
        raise ValueError(f"{out}: it is one of the models to merge; give another folder")


def _fill(out: Path, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Work in a folder as it is, but for weights that a killed call has left."""
    for file in out.iterdir():
        if _WEIGHTS.fullmatch(file.name):
            file.unlink()
    return work(out)


def _write(
    folder: Path,
    models: Sequence[StoredTensors],
    recipe: Method,
    shares: Sequence[float],
    density: float,
    max_shard_bytes: int,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    first = models[0]
    counted: Counter[str] = Counter()

    def make(name: str) -> Tensor:
        tensor, counts = _merge_tensor(name, models, recipe, shares, density)
        counted.update(counts)
        return tensor

    written = write_tensors(folder, first.metas, make, max_shard_bytes, on_progress)
    copy_companions(first.folder, folder, "config.json")
    return {**written, "num_identical": 0, **counted}


def _merge_tensor(
    name: str, models: Sequence[StoredTensors], recipe: Method, shares: Sequence[float], density: float
) -> tuple[Tensor, dict[str, int]]:
    """One tensor of the result, in memory, and what was counted."""
    with ExitStack() as stack:
        flat = [stack.enter_context(model.read(name)).reshape(-1) for model in models]
        sources = flat[: len(shares)]
        shape = models[0].shapes[name]
        if all(_same(sources[0], other) for other in sources[1:]):
            return sources[0].clone().view(shape), {"num_identical": 1}
        for model, tensor in zip(models, flat, strict=True):
            _check_mergeable(f"{model.folder}: tensor {name}", tensor)
        base_N = flat[-1] if recipe.needs_base else None
        out_N, counts = recipe.combine(sources, base_N, shares, density)
        return out_N.view(shape), counts


def _same(one_N: Tensor, two_N: Tensor) -> bool:
    if one_N.dtype == two_N.dtype:
        return torch.equal(one_N, two_N)
    return all(torch.equal(wide(one_N[part]), wide(two_N[part])) for part in chunks(one_N.numel()))


def _check_mergeable(place: str, tensor_N: Tensor) -> None:
    if not tensor_N.is_floating_point():
        raise ValueError(
            f"{place}: it is {tensor_N.dtype} and not the same in all models, but only real numbers can be merged; "
            "make it the same"
        )
    if not all(bool(torch.isfinite(tensor_N[part]).all()) for part in chunks(tensor_N.numel())):
        raise ValueError(f"{place}: it holds NaN or infinity; train that model again, or leave it out")

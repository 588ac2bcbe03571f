"""From a hybrid's folder to one that vLLM serves by itself."""

import json
from pathlib import Path
from typing import Any

from hybridize.models.checkpoint import check_output, read_model_type
from hybridize.models.configs import hybrid_config_class
from hybridize.models.contents import check_hybrid
from hybridize.models.exports.formats import Format
from hybridize.models.exports.granite import GRANITE
from hybridize.models.exports.pieces import Pieces, check_used
from hybridize.models.exports.qwen import QWEN
from hybridize.models.families import HYBRID_PREFIX, find_family
from hybridize.models.stored import Progress, StoredTensors, copy_companions, make_folder, write_tensors
from hybridize.spec.base import choose

FORMATS: dict[str, Format] = {form.name: form for form in (GRANITE, QWEN)}

_SHOWN = 4
"""Obstacles that an error lists."""


def export_native(
    source_dir: str | Path,
    target_dir: str | Path,
    form: str | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a hybrid as an architecture that transformers and vLLM have themselves, where it is exactly that.

    What is written computes the same, up to the order of sums; only weights of Qwen 3's query and key norms may be
    rounded, and `notes` says so.

    Args:
        source_dir: folder of a hybrid.
        target_dir: the folder to make. It must not exist, or be empty, and appears whole or not at all.
        form: name of one of `FORMATS`; None for the one that fits.
        max_shard_bytes: of a safetensors file; also about what is held in memory.
        on_progress: called with (tensors done, all tensors).

    Returns:
        `form`; `architecture`, by its name in vLLM; `layout`, as one word; `notes`, what the format costs or rounds, a
        line each; `num_added`, parameters that the hybrid has not; `num_tensors`, `num_parameters`, `num_bytes`,
        `num_shards`.

    Raises:
        ValueError: the folder holds no hybrid, no format fits (names for each the layers and what prevents it), a
            tensor is missing or superfluous, or `target_dir` is not empty.
        OSError: the disk is full, or may not be written to.
    """
    import transformers

    source, target = Path(source_dir), Path(target_dir)
    check_output(target)
    file = source / "config.json"
    model_type = read_model_type(source)
    if not model_type.startswith(HYBRID_PREFIX):
        raise ValueError(f"{file}: model_type is {model_type!r}, which is no hybrid's; give a folder of a hybrid")
    family = find_family(model_type, f"{file}: model_type")
    config = hybrid_config_class(family.model_type).from_dict(json.loads(file.read_text(encoding="utf-8")))
    chosen = choose_format(config, str(file), form)
    stored = StoredTensors(source)
    check_hybrid(stored, config)
    pieces = Pieces(stored)
    notes = chosen.plan(config, pieces)
    check_used(pieces)
    exported = getattr(transformers, chosen.config_class)(**chosen.fields(config, pieces))
    exported.architectures = [chosen.architecture]

    def work(folder: Path) -> dict[str, Any]:
        exported.save_pretrained(folder)
        counts = write_tensors(folder, pieces.metas, pieces.make, max_shard_bytes, on_progress)
        copy_companions(source, folder)
        return counts

    counts = make_folder(target, work)
    num_own = sum(meta.numel() for meta in stored.metas.values())
    return {
        "form": chosen.name,
        "architecture": chosen.architecture,
        "layout": str(config.layout),
        "notes": notes,
        "num_added": counts["num_parameters"] - num_own,
        **counts,
    }


def choose_format(config: Any, place: str, form: str | None = None) -> Format:
    """The format that a hybrid is written in.

    Args:
        config: the hybrid's.
        place: what to call it in errors.
        form: name of one of `FORMATS`, to be that; None for the first that fits.

    Raises:
        ValueError: there is none; says for each what prevents it.
    """
    candidates = list(FORMATS.values()) if form is None else [FORMATS[choose("form", form, FORMATS)]]
    reasons = []
    for candidate in candidates:
        obstacles = candidate.obstacles(config)
        if not obstacles:
            return candidate
        more = f" (and {len(obstacles) - _SHOWN} more)" if len(obstacles) > _SHOWN else ""
        reasons.append(f"not as {candidate.name}, since " + "; ".join(obstacles[:_SHOWN]) + more)
    raise ValueError(
        f"{place}: vLLM cannot serve this hybrid by itself: {'. '.join(reasons)}. "
        "Serve the folder as it is, with the plugin, or convert without what is in the way"
    )

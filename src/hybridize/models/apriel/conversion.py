"""Both ways, from a folder to a folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridize.files import write_whole
from hybridize.models.apriel.configs import MODEL_TYPE, OLDER_MODEL_TYPES, apriel_fields, hybrid_config
from hybridize.models.apriel.tensors import Piece, plan_export, plan_import
from hybridize.models.checkpoint import check_output, read_model_type
from hybridize.models.configs import hybrid_config_class
from hybridize.models.families import find_family
from hybridize.models.stored import Progress, StoredTensors, copy_companions, make_folder, write_tensors


def import_apriel(
    source_dir: str | Path,
    target_dir: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a hybrid's folder of a released Apriel-H1 checkpoint's (arXiv 2511.02651).

    Tensors keep their bits; `load_model(target_dir)` then loads the hybrid, whose mixers add the step-size bias twice
    as those checkpoints expect. Where `i` leaves a layer out, an MLP of zeros stands in.

    Args:
        source_dir: folder of the checkpoint: config.json and safetensors, in one file or many.
        target_dir: the folder to make. It must not exist, or be empty, and appears whole or not at all.
        max_shard_bytes: of a safetensors file; also about what is held in memory.
        on_progress: called with (tensors done, all tensors).

    Returns:
        `layout`, as one word; `lacking`, the fields which config.json leaves to Mistral's defaults though no tensor
        could contradict a wrong one, with their values; `num_tensors`, `num_parameters`, `num_bytes`, `num_shards`.

    Raises:
        ValueError: the folder holds no such checkpoint, a kind of layer has no counterpart, a key or a tensor is
            unknown, missing or contradicts another, or `target_dir` is not empty. Names the place and the remedy.
        OSError: the disk is full, or may not be written to.
    """
    source, target = Path(source_dir), Path(target_dir)
    check_output(target)
    file = source / "config.json"
    model_type = read_model_type(source)
    if model_type not in (MODEL_TYPE, *OLDER_MODEL_TYPES):
        raise ValueError(
            f"{file}: model_type is {model_type!r}, but an Apriel-H1 checkpoint has {MODEL_TYPE!r} "
            f"(or, older, {', '.join(map(repr, OLDER_MODEL_TYPES))}); give the folder of one"
        )
    stored = StoredTensors(source)
    config, lacking = hybrid_config(json.loads(file.read_text(encoding="utf-8")), stored.shapes, str(file))
    plan = plan_import(stored, config)

    def work(folder: Path) -> dict[str, Any]:
        config.save_pretrained(folder)
        return _written(source, folder, stored, plan, max_shard_bytes, on_progress)

    return {"layout": str(config.layout), "lacking": lacking, **make_folder(target, work)}


def export_apriel(
    source_dir: str | Path,
    target_dir: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a checkpoint in Apriel-H1's format of a hybrid's folder: the reverse of `import_apriel`.

    Tensors keep their bits, but for the step-size bias of mixers that add it once: half of it is written, exactly,
    since readers of the format add it twice. Modelling code is not written; whoever needs it has it with the release.

    Args:
        source_dir: folder of a hybrid of a Mistral whose layers are attention; mamba1 of one size, without norms of
            queries and keys and without biases on gate, projections and output; or identities of attention and MLP
            alike.
        target_dir: as in `import_apriel`.
        max_shard_bytes: as in `import_apriel`.
        on_progress: as in `import_apriel`.

    Returns:
        `layout`, as one word; `num_halved`, how many biases were halved; `num_tensors`, `num_parameters`,
        `num_bytes`, `num_shards`.

    Raises:
        ValueError: the folder holds no such hybrid (names the layer and what prevents it), a tensor is missing or
            superfluous, or `target_dir` is not empty.
        OSError: the disk is full, or may not be written to.
    """
    source, target = Path(source_dir), Path(target_dir)
    check_output(target)
    file = source / "config.json"
    model_type, hybrid_type = read_model_type(source), find_family("mistral").hybrid_type
    if model_type != hybrid_type:
        raise ValueError(
            f"{file}: model_type is {model_type!r}, but Apriel-H1 is a {hybrid_type!r}; give a hybrid of a Mistral"
        )
    config = hybrid_config_class("mistral").from_dict(json.loads(file.read_text(encoding="utf-8")))
    fields = apriel_fields(config, str(file))
    stored = StoredTensors(source)
    plan = plan_export(stored, config, str(file))

    def work(folder: Path) -> dict[str, Any]:
        write_whole(folder / "config.json", json.dumps(fields, indent=2, sort_keys=True) + "\n")
        return _written(source, folder, stored, plan, max_shard_bytes, on_progress)

    num_halved = sum(piece.halved for piece in plan.values())
    return {"layout": str(config.layout), "num_halved": num_halved, **make_folder(target, work)}


def _written(
    source: Path,
    folder: Path,
    stored: StoredTensors,
    plan: Mapping[str, Piece],
    max_shard_bytes: int,
    on_progress: Progress | None,
) -> dict[str, Any]:
    """Write the planned tensors, and what goes along with them."""
    metas = {name: piece.meta for name, piece in plan.items()}
    counts = write_tensors(folder, metas, lambda name: plan[name].make(stored), max_shard_bytes, on_progress)
    copy_companions(source, folder)
    return counts

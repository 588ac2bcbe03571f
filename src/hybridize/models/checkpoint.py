"""Checkpoints on disk: loading that never invents a tensor, saving that is never half done."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hybridize.models.families import FAMILIES, HYBRID_PREFIX, find_family
from hybridize.models.hybrid import hybrid_model_class

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(path: str | Path, *, dtype: torch.dtype | str = "auto", **kwargs: Any) -> Any:
    """Load a teacher or a hybrid, whichever the folder holds.

    Args:
        path: a folder with config.json and safetensors; or the name of a repository on the Hugging Face hub.
        dtype: of the parameters; `auto` takes the checkpoint's. What must be fp32 in a mixer stays fp32.
        **kwargs: handed to transformers' `from_pretrained`, e.g. `attn_implementation`, `device_map`.

    Returns:
        The causal language model, in evaluation mode.

    Raises:
        ValueError: the folder or its config.json is missing, the family is not in the table, a file is
            damaged, or a tensor is missing, superfluous or of another shape. Names the file or the tensors
            and the remedy.
    """
    model_type, problem = None, None
    folder = Path(path)
    if folder.is_dir() or not _REPOSITORY.fullmatch(str(path)):
        model_type = read_model_type(folder)
        check_files(folder)
    else:
        model_type, problem = _remote_model_type(str(path))
    if problem is not None:
        raise ValueError(
            f"{path}: there is no such folder, and as the name of a hub repository it does not load "
            f"({problem}); check the path"
        )
    family = find_family(model_type, f"{path}/config.json: model_type")
    is_hybrid = (model_type or "").startswith(HYBRID_PREFIX)
    model_class = hybrid_model_class(family.model_type) if is_hybrid else family.teacher_model()
    model, report = model_class.from_pretrained(
        path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    _check_loading(str(path), model, report)
    return model.eval()


def load_teacher(path: str | Path, **kwargs: Any) -> Any:
    """Load a teacher: as `load_model`, frozen; a hybrid is refused.

    Raises:
        ValueError: as `load_model`; or the folder holds a hybrid.
    """
    folder = Path(path)
    if folder.is_dir() and read_model_type(folder).startswith(HYBRID_PREFIX):
        raise ValueError(f"{path}: it holds a hybrid, but a teacher is asked for; give the original model's folder")
    model = load_model(path, **kwargs)
    if hasattr(model.config, "mixers"):
        raise ValueError(f"{path}: it holds a hybrid, but a teacher is asked for; give the original model's name")
    return model.requires_grad_(False)


def save_hybrid(model: Any, tokenizer: Any, out: str | Path, *, max_shard_size: str = "5GB") -> Path:
    """Write a model and its tokenizer to a folder that appears whole or not at all.

    Everything is written to a hidden sibling folder first, which is then renamed.

    Args:
        model: a hybrid (or any transformers model).
        tokenizer: its tokenizer; None to leave it out.
        out: the folder to make; it must not exist, or be empty.
        max_shard_size: largest safetensors file, e.g. `5GB`.

    Returns:
        The folder.

    Raises:
        ValueError: `out` exists and is not an empty folder.
    """
    out = Path(out)
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's folders are private
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def check_output(out: str | Path) -> None:
    """Raise a `ValueError` if a folder to be written exists and is not empty."""
    out = Path(out)
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out}: it exists already and nothing is ever overwritten; remove it or give another folder")


def read_model_type(folder: Path) -> str:
    """Read `model_type` from a folder's config.json.

    Raises:
        ValueError: the folder or the file is missing, or the file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; check the path")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: it has no config.json, so it is no checkpoint; give the folder that holds one")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: it is not readable as JSON ({error}); fetch or write the checkpoint again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{file}: it names no model_type; add one of {', '.join(FAMILIES)} if it is such a model")
    return config["model_type"]


def check_files(folder: Path) -> None:
    """Check that a folder's weight files are all there and whole, without reading the tensors.

    Raises:
        ValueError: names the file and the remedy.
    """
    for file in weight_files(folder):
        if not file.is_file():
            raise ValueError(f"{file}: the index lists it, but it is missing; fetch or write the checkpoint again")
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: it is damaged, perhaps cut short ({error}); fetch or write the checkpoint again"
            ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index lists them if it has one.

    Raises:
        ValueError: there are none, or the index is unreadable.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: it is not a readable index; fetch or write the checkpoint again") from None
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: it has no *.safetensors; fetch the weights, or save them as safetensors")
    return files


def _remote_model_type(name: str) -> tuple[str | None, str | None]:
    """The model type of a repository on the hub, or why there is none."""
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(name)[0].get("model_type"), None
    except OSError as error:
        return None, str(error).splitlines()[0]


def _check_loading(path: str, model: Any, report: dict[str, Any]) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    faults = []
    missing = sorted(set(report.get("missing_keys", ())) - tied)
    if missing:
        faults.append(f"tensors are missing: {_some(missing)}")
    mismatched = sorted(str(entry) for entry in report.get("mismatched_keys", ()))
    if mismatched:
        faults.append(f"tensors have another shape than the config says (name, found, expected): {_some(mismatched)}")
    unexpected = sorted(report.get("unexpected_keys", ()))
    if unexpected:
        faults.append(f"tensors belong to no part of the model: {_some(unexpected)}")
    faults += [str(error) for error in report.get("error_msgs", ())]
    if faults:
        raise ValueError(
            f"{path}: the checkpoint and its config.json do not fit together; {'; '.join(faults)}. "
            "Fetch or convert the model again"
        )


def _some(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

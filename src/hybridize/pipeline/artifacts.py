"""Folders that stages leave behind: whole or not at all, with a manifest that says what they came from."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FORMAT = "hybridize.manifest/1"
MANIFEST = "manifest.json"
_KEY_FILE = "stage.key"
_LIBRARIES = ("hybridize", "torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "numpy")
_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Artifact:
    """A finished stage.

    Attributes:
        folder: where it is.
        manifest: what `manifest.json` holds.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Hash over the content of all files."""
        return digest_of(self.manifest["files"])

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the stage measured."""
        return self.manifest["metrics"]


def digest_of(value: object) -> str:
    """SHA-256 of plain data in canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint_model(path: str) -> str:
    """What identifies a teacher: its name on the hub, or the content of its folder.

    Of a weight file, size and the first and last megabyte are hashed, so that a large teacher costs no minute.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"hub:{path}"
    parts = []
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and file.is_file():
            parts.append([file.name, file.stat().st_size, _edges(file)])
    return digest_of(parts)


def fingerprint_file(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_artifact(folder: Path, key: str | None = None) -> Artifact | None:
    """A finished stage's artifact, if the folder holds one (made from `key`, if one is given).

    Raises:
        ValueError: a file of it is missing, truncated or edited; names the file and the remedy.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
        if manifest["format"] != FORMAT:
            raise KeyError("format")
        recorded = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: is damaged; remove {folder} and run again") from None
    if key is not None and manifest["key"] != key:
        return None
    for name, facts in recorded.items():
        part = folder / name
        if not part.is_file():
            raise ValueError(f"{part}: is missing, though {MANIFEST} lists it; remove {folder} and run again")
        if part.stat().st_size != facts["bytes"] or fingerprint_file(part) != facts["sha256"]:
            raise ValueError(f"{part}: was truncated or edited since it was written; remove {folder} and run again")
    return Artifact(folder, manifest)


def make_artifact(
    folder: Path,
    *,
    kind: str,
    key: str,
    spec: Mapping[str, Any],
    inputs: Mapping[str, str],
    work: Callable[[Path], Mapping[str, Any]],
    scratch: Iterable[str] = (),
    replace: bool = False,
) -> Artifact:
    """Do a stage's work in a hidden sibling folder, then give it its name.

    What an earlier, killed call with the same key left in the hidden folder is there for `work` to go on from.

    Args:
        folder: what the artifact will be called.
        kind: of stage.
        key: identifies what the stage would make; another key's leftovers are removed.
        spec: the stage's spec as plain data.
        inputs: digests of what it was made from, by name.
        work: fills a folder and returns metrics as plain data.
        scratch: names inside that folder which do not belong to the result (checkpoints to resume from).
        replace: whether an older artifact of that name may be replaced.

    Raises:
        ValueError: the folder exists and may not be replaced.
    """
    if folder.exists() and not replace and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: it exists already and nothing is overwritten; remove it or give another folder")
    partial = folder.parent / f".{folder.name}.partial"
    key_file = partial / _KEY_FILE
    if partial.exists() and (not key_file.is_file() or key_file.read_text() != key):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_text(key_file, key)
    started = time.perf_counter()
    metrics = work(partial)
    for name in (*scratch, _KEY_FILE):
        _remove(partial / name)
    files = {
        str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": fingerprint_file(file)}
        for file in sorted(partial.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "key": key,
        "spec": dict(spec),
        "inputs": dict(inputs),
        "files": files,
        "metrics": dict(metrics),
        "seconds": time.perf_counter() - started,
        "created": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": library_versions(),
    }
    write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
    if folder.exists():
        old = folder.parent / f".{folder.name}.old"
        _remove(old)
        folder.rename(old)
        partial.rename(folder)
        _remove(old)
    else:
        partial.rename(folder)
    return Artifact(folder, manifest)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: a reader sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def library_versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _edges(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_EDGE_BYTES))
        if size > _EDGE_BYTES:
            stream.seek(max(_EDGE_BYTES, size - _EDGE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

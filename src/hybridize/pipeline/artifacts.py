"""Folders that stages leave behind: whole or not at all, with a manifest that says what they came from."""

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hybridize.files import write_whole
from hybridize.pipeline.locking import alone_in
from hybridize.pipeline.progress import Reporter
from hybridize.spec.base import StoppedError

FORMAT = "hybridize.manifest/1"
MANIFEST = "manifest.json"
_KEY_FILE = "stage.key"
_LIBRARIES = ("hybridize", "torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "numpy")
_BLOCK_BYTES = 1 << 16
_NUM_BLOCKS = 512
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO)


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


def fingerprint_model(path: str | Path, *, whole: bool = False) -> str:
    """What identifies a model: its name and revision on the hub, or the content of its folder.

    Args:
        path: folder or name.
        whole: hash every byte; otherwise, of a large weight file, its size and 512 blocks spread over it, so that a
            large teacher costs no minute.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"hub:{path}@{_revision(str(path))}"
    parts = []
    for file in sorted(folder.iterdir()):
        known = file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and file.name != MANIFEST
        if known and file.is_file():
            parts.append([file.name, file.stat().st_size, fingerprint_file(file) if whole else _sample(file)])
    return digest_of(parts)


def _revision(name: str) -> str:
    """The commit of a hub repository that is in the local cache, where its config lies once it was read; else empty."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent.name if isinstance(file, str) else ""


def fingerprint_file(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_artifact(folder: Path, key: str | None = None, may_lack: str | None = None) -> Artifact | None:
    """A finished stage's artifact, if the folder holds one (made from `key`, if one is given).

    Args:
        folder: where it is.
        key: what it must have been made from.
        may_lack: suffix of files that need not be there, for who does not read them: `.safetensors`, weights that were
            left on another machine.

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
        if part.suffix == may_lack and not part.exists():
            continue
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
    say: Callable[[str], None] | None = None,
) -> Artifact:
    """Do a stage's work in a hidden sibling folder, then give it its name.

    What an earlier, killed call with the same key left in the hidden folder is there for `work` to go on from. Of two
    calls at once, the second fails.

    Args:
        folder: what the artifact will be called.
        kind: of stage.
        key: identifies what the stage would make; another key's leftovers are removed.
        spec: the stage's spec as plain data.
        inputs: digests of what it was made from, by name.
        work: fills a folder and returns metrics as plain data.
        scratch: names inside that folder which do not belong to the result (checkpoints to resume from).
        replace: whether an older artifact of that name may be replaced.
        say: told what a person should know; by default it goes to standard error.

    Raises:
        ValueError: the folder exists and may not be replaced, or is no artifact; or unfinished work of another key,
            with something in `scratch`, would be lost and `replace` is not given; or another process is at work on it.
        StoppedError: the disk is full or cannot be written.
    """
    partial = folder.parent / f".{folder.name}.partial"
    key_file = partial / _KEY_FILE
    scratch = tuple(scratch)
    lock_file = folder.parent / f".{folder.name}.lock"
    with writing(folder), alone_in(folder, lock_file, say or Reporter().say):
        check_target(folder, replace)
        finished = _read_finished(partial, key)
        if finished is not None:
            return _publish(partial, folder, finished, scratch)
        if partial.exists() and (not key_file.is_file() or key_file.read_text() != key):
            _check_leftovers(partial, scratch, replace)
            shutil.rmtree(partial)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            write_whole(key_file, key)
            started = time.perf_counter()
            metrics = work(partial)
        except BaseException:
            _remove_if_hollow(partial)
            raise
        for left in partial.rglob(".*.tmp"):  # by a write that was killed before its rename
            left.unlink()
        files = {
            str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": fingerprint_file(file)}
            for file in sorted(partial.rglob("*"))
            if file.is_file() and _belongs(file.relative_to(partial), scratch)
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
        # Once the manifest is there, the work is done: a call killed from here on is finished by the next.
        write_whole(partial / MANIFEST, json.dumps(manifest, indent=1))
        return _publish(partial, folder, manifest, scratch)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn the many ways in which writing to a disk fails into one message.

    Raises:
        StoppedError: names the file or `place`, the system's reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            raise
        raise StoppedError(_explain_write(error.filename or place, error.strerror)) from error
    except Exception as error:
        text = str(error)
        if type(error).__name__ == "SafetensorError" and "I/O error" in text:
            raise StoppedError(_explain_write(place, text.partition("I/O error: ")[2] or text)) from error
        if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
            free = f"{shutil.disk_usage(_existing(place)).free / 1e6:,.1f} MB are free"
            raise StoppedError(_explain_write(place, f"writing a checkpoint failed, {free}")) from error
        raise


def _explain_write(place: object, reason: object) -> str:
    return (
        f"{place}: {reason}; make room, or see that it may be written to, and give the same command again: "
        "what was finished is kept"
    )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def check_target(folder: Path, replace: bool) -> None:
    """Raise a `ValueError` if a result cannot go to a folder without harm to what is there.

    Args:
        folder: where to.
        replace: whether an older result of a stage may be replaced; anything else never is.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not replace:
        raise ValueError(f"{folder}: it exists already and nothing is overwritten; remove it or give another folder")
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder}: it has no {MANIFEST}, so it is not the result of a stage, and is left alone; move it away, or "
            "give the stage another name or the recipe another output"
        )


def _check_leftovers(partial: Path, scratch: Iterable[str], replace: bool) -> None:
    """Refuse to throw away checkpoints, but where a changed recipe asks for it."""
    kept = [name for name in scratch if (partial / name).is_dir() and any((partial / name).iterdir())]
    if kept and not replace:
        raise ValueError(
            f"{partial}: it holds the unfinished work ({', '.join(kept)}) of a call with other settings, data or "
            "models; give that call again to go on with it, or remove the folder to start afresh"
        )


def _read_finished(partial: Path, key: str) -> Mapping[str, Any] | None:
    """The manifest of work that was done, but killed before it got its name."""
    try:
        finished = read_artifact(partial, key)
    except ValueError:
        (partial / MANIFEST).unlink()
        return None
    return finished.manifest if finished else None


def _publish(partial: Path, folder: Path, manifest: Mapping[str, Any], scratch: Iterable[str]) -> Artifact:
    for name in (*scratch, _KEY_FILE):
        _remove(partial / name)
    old = folder.parent / f".{folder.name}.old"
    if folder.exists():
        _remove(old)
        folder.rename(old)
    partial.rename(folder)
    _remove(old)
    return Artifact(folder, manifest)


def _belongs(name: Path, scratch: Iterable[str]) -> bool:
    return name.parts[0] not in (*scratch, _KEY_FILE, MANIFEST)


def _remove_if_hollow(partial: Path) -> None:
    """Leave no trace of a call that failed before it made anything."""
    with suppress(OSError):
        if not any(file.is_file() and _KEY_FILE not in file.name for file in partial.rglob("*")):
            shutil.rmtree(partial)


def library_versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _sample(file: Path) -> str:
    """Hash blocks spread evenly over a file, all of it if it is small."""
    size = file.stat().st_size
    if size <= _NUM_BLOCKS * _BLOCK_BYTES:
        return fingerprint_file(file)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in range(_NUM_BLOCKS):
            stream.seek(block * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

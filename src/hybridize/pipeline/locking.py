"""One process at a time in a folder: an advisory lock, which the system takes back however the process ends."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)

_held_here: set[tuple[int, Path]] = set()
"""Locks of this process, with its number, since the system's do not shut out a process from its own."""

_told: set[int] = set()
"""Filesystems without locks that were spoken of."""


@contextmanager
def alone_in(folder: Path, file: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Work in a folder while no other process does that asks in this way; never waits.

    The lock is a POSIX record lock, so that children do not inherit it: it ends with the process itself. Its file
    says who holds it, and is removed afterwards; one that a killed process left behind does no harm.

    Args:
        folder: for messages.
        file: what is locked; its folder is made if it is missing.
        say: told, once per filesystem, that it keeps no locks; the work goes on without.

    Raises:
        ValueError: another process holds the lock; names the folder and that process.
        OSError: the file cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    mine = (os.getpid(), file.resolve())
    if mine in _held_here:  # and leave the file alone: to close it once more would give the lock up
        raise ValueError(_explain(folder, f"this very process, {mine[0]},"))
    descriptor = _lock(folder, file, say)
    _held_here.add(mine)
    try:
        holder = {"process": mine[0], "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        _held_here.discard(mine)
        with suppress(OSError):
            file.unlink()  # while it is locked: who opened it meanwhile finds out that it is gone
        os.close(descriptor)


def _lock(folder: Path, file: Path, say: Callable[[str], None]) -> int:
    """The descriptor of the file, locked if there are locks."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            device = os.fstat(descriptor).st_dev
            holder = _read_holder(descriptor)
            if error.errno in _NO_LOCKS:
                if device not in _told:
                    _told.add(device)
                    say(
                        f"{folder}: its filesystem keeps no locks ({error.strerror}); see to it that no other process "
                        "works there"
                    )
                return descriptor
            os.close(descriptor)
            if error.errno in _HELD:
                raise ValueError(_explain(folder, holder)) from None
            raise
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == file.stat().st_ino:
                return descriptor
        os.close(descriptor)  # its holder had removed it between the two calls


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {holder['process']} on {holder['host']}, begun at {holder['since']},"
    except (ValueError, KeyError, TypeError):
        return "another process"  # that has not yet written who it is


def _explain(folder: Path, holder: str) -> str:
    return f"{folder}: {holder} is working in it; wait until that has ended, or give another folder"

"""Compares mathematical answers by math-verify, in a process of its own.

math-verify stops long computations by a signal, which works in a process's main thread only and interrupts no
big-number arithmetic; and a model may well write `9^{9^{9^9}}`. In a process of its own it always has a main thread,
and the process can be ended from outside.
"""

import contextlib
import importlib.util
import json
import selectors
import subprocess
import sys
import weakref
from typing import IO

_START_SECONDS = 120.0  # until the process has imported sympy
_PATIENCE_SECONDS = 20.0  # math-verify itself gives up after 5 per expression


class MathJudge:
    """Says whether a text's final expression equals a reference.

    Args:
        patience_seconds: after so long a comparison counts as failed.

    Raises:
        ImportError: math-verify is not installed.
    """

    def __init__(self, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("verifier math: math-verify is not installed; pip install 'hybridize[eval]'")
        self._patience_seconds = patience_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize | None = None

    def __call__(self, reference: str, text: str) -> bool:
        """Whether math-verify finds `text` to say the same as `reference`; False if it cannot tell in time."""
        process = self._process if self._process and self._process.poll() is None else self._start()
        verdict = _ask(process, [reference, text], self._patience_seconds)
        if verdict is None:  # too slow, or out of memory: the next one begins afresh
            self.close()
        return bool(verdict)

    def close(self) -> None:
        """End the process."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _start(self) -> "subprocess.Popen[bytes]":
        self.close()
        code = "from hybridize.data.verify_math import serve; serve()"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # math-verify logs each timeout
        )
        self._process, self._finalizer = process, weakref.finalize(self, _end, process)
        if _ask(process, ["1", "1"], _START_SECONDS) is not True:
            self.close()
            raise RuntimeError("verifier math: math-verify does not start; try python -c 'import math_verify'")
        return process


def serve() -> None:
    """Answer questions on standard input, [reference, text] in JSON a line, by true or false on standard output."""
    from math_verify import parse, verify

    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # nothing that a library prints is taken for an answer
        for line in sys.stdin:
            reference, text = json.loads(line)
            try:
                right = bool(verify(parse(reference), parse(text)))
            except Exception:  # sympy raises anything on what a model may write
                right = False
            print(json.dumps(right), file=answers, flush=True)


def _ask(process: "subprocess.Popen[bytes]", question: list[str], seconds: float) -> bool | None:
    """The answer, or None if it does not come in time or at all."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = _read_line(process.stdout, seconds)
    return json.loads(line) if line.endswith(b"\n") else None


def _read_line(stream: IO[bytes], seconds: float) -> bytes:
    """A line, or nothing if none begins in time; a line is short, so that it comes whole."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(seconds) else b""


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()

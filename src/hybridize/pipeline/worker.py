"""A process that does stages for another one, which hears of everything that happens through a pipe.

It ends when its pipe does, so that it never outlives who started it; what it was doing then is gone on with by the next
run, as after any other end.
"""

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from rich.console import Console

from hybridize.pipeline.artifacts import Artifact
from hybridize.pipeline.progress import Advance, Reporter
from hybridize.spec.base import StoppedError
from hybridize.spec.data import DataSpec
from hybridize.spec.stages import StageSpec, ThroughputStage

GRACE_SECONDS = 10.0
"""How long a worker has to come to an end by itself."""

_SECONDS_BETWEEN_BARS = 0.1


@dataclass(frozen=True)
class Run:
    """What all stages of a run share, for a worker.

    Attributes:
        teacher: path or name of the teacher.
        teacher_print: what identifies it.
        data: the recipe's.
        output: the run's folder.
        threads: of a CPU that the worker may use.
        all_threads: that it uses while nothing runs beside it, where speed is measured; None: as many.
        draws_bars: whether progress is wanted in small steps.
    """

    teacher: str
    teacher_print: str
    data: DataSpec
    output: Path
    threads: int
    all_threads: int | None
    draws_bars: bool


@dataclass(frozen=True)
class Task:
    """A stage to do, with the finished stages that it reads."""

    stage: StageSpec
    inputs: dict[str, Artifact]


@dataclass(frozen=True)
class Said:
    """A line for a person."""

    text: str


@dataclass(frozen=True)
class Moved:
    """A bar has moved; `total` None: it is gone."""

    title: str
    done: int
    total: int | None
    note: str = ""


@dataclass(frozen=True)
class Failed:
    """A stage did not work out.

    Attributes:
        kind: a mistake of the user's, a stop that more work or memory can cure, or a fault of the program's.
        text: the message; of a fault, its traceback.
    """

    kind: Literal["mistake", "stop", "fault"]
    text: str

    def as_error(self) -> Exception:
        """The exception to raise for it."""
        return {"mistake": ValueError, "stop": StoppedError, "fault": RuntimeError}[self.kind](self.text)


class _PipedReporter(Reporter):
    """Says everything through a pipe."""

    def __init__(self, pipe: Connection, draws_bars: bool) -> None:
        super().__init__(Console(quiet=True))
        self.pipe, self.draws_bars = pipe, draws_bars

    def say(self, text: str) -> None:
        """Send a line."""
        self.pipe.send(Said(text))

    @contextmanager
    def bar(self, title: str) -> Iterator[Advance]:
        """Send a bar's moves, or lines at every tenth."""
        if not self.draws_bars:
            yield self._lines(title)
            return
        last = float("-inf")

        def advance(done: int, total: int, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_BARS:
                last = now
                self.pipe.send(Moved(title, done, total, note))

        try:
            yield advance
        finally:
            self.pipe.send(Moved(title, 0, None))


def work(pipe: Connection, run: Run) -> None:
    """Do each `Task` that comes through the pipe; answer with its `Artifact`, or with what `Failed`.

    A signal to terminate ends it as Ctrl-C does: what is unfinished is left so that the next run goes on from there.
    """
    if "OMP_NUM_THREADS" in os.environ:  # a person's word counts, beside others and alone
        run = replace(run, all_threads=None)
    else:
        os.environ["OMP_NUM_THREADS"] = str(run.threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it hears Ctrl-C, and ends it
    signal.signal(signal.SIGTERM, _interrupt)
    tasks: SimpleQueue[Task] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, tasks), daemon=True).start()
    with suppress(KeyboardInterrupt, BrokenPipeError):
        while True:
            pipe.send(_do(tasks.get(), run, _PipedReporter(pipe, run.draws_bars)))


def _do(task: Task, run: Run, reporter: Reporter) -> Artifact | Failed:
    from hybridize.pipeline.runner import run_stage
    from hybridize.pipeline.stages import Job

    job = Job(run.teacher, run.data, reporter, dict(task.inputs))
    try:
        with _threads_for(task.stage, run):
            return run_stage(task.stage, job, run.output / task.stage.name, run.teacher_print, replace=True)
    except (StoppedError, OSError) as error:
        return Failed("stop", str(error))
    except (ValueError, ImportError) as error:
        return Failed("mistake", str(error))
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name
            return Failed(
                "stop", f"{str(error).splitlines()[0]} use fewer jobs, or smaller batches; what is done is kept"
            )
        return Failed("fault", traceback.format_exc())
    except Exception:
        return Failed("fault", traceback.format_exc())
    finally:
        with suppress(RuntimeError):  # CUDA's, after a fault of which the answer tells; this process is not used again
            _free_memory()


@contextmanager
def _threads_for(stage: StageSpec, run: Run) -> Iterator[None]:
    """Use all threads while speed is measured, since then nothing runs beside it."""
    if run.all_threads is None or not isinstance(stage, ThroughputStage):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(run.all_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _listen(pipe: Connection, tasks: Any) -> None:
    """Pass tasks on until the pipe ends; then end the process, by force if need be."""
    with suppress(EOFError, OSError):
        while True:
            tasks.put(pipe.recv())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt


def _free_memory() -> None:
    """Give back what the last stage's models took, for the stages beside."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()

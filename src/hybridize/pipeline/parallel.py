"""Do the stages of a recipe side by side: each as soon as what it reads is finished, in processes of their own.

A pocket-sized model keeps a GPU busy for a fraction of a step only, so that several stages share it well. What a stage
makes is the same as in a row; only its lines come between those of others. Measurements of speed are done with nothing
beside them, when all else is waiting for them or done. A machine's GPUs are dealt out among the processes, one to each.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from rich.markup import escape
from rich.progress import Progress, TaskID

from hybridize.pipeline.artifacts import Artifact
from hybridize.pipeline.gpus import gpu_names, seeing
from hybridize.pipeline.progress import COLUMNS, Reporter
from hybridize.pipeline.worker import GRACE_SECONDS, Failed, Moved, Run, Said, Task, work
from hybridize.spec.base import StoppedError
from hybridize.spec.stages import ReportStage, StageSpec, ThroughputStage


def run_side_by_side(
    stages: tuple[Any, ...],
    run: Run,
    jobs: int,
    reporter: Reporter,
    *,
    standing: Callable[[Any, Mapping[str, Artifact]], Artifact | None],
    report: Callable[[ReportStage, Mapping[str, Artifact]], Artifact],
    describe: Callable[[Any], str],
    outcome: Callable[[Any, Artifact], str],
) -> dict[str, Artifact]:
    """Do stages in up to `jobs` processes.

    One that fails stops neither those beside it nor any that does not need it; what needs it is left out, but for a
    report, which then is about the others.

    Args:
        stages: spelled out, in the recipe's order.
        run: what they share.
        jobs: processes, at least one.
        reporter: where progress goes.
        standing: a stage's artifact if it need not be done, given those it reads.
        report: makes a report in this process, given all artifacts before it.
        describe: a stage in a few words.
        outcome: what came out of one.

    Returns:
        Artifacts by name, in the order of the stages.

    Raises:
        ValueError: a stage found a mistake of the user's.
        StoppedError: a stage was stopped, its process was killed, or several stages failed; names each.
        RuntimeError: a fault of the program's, with its traceback.
    """
    plan = _Plan(stages)
    board = _Board(reporter)
    crew = _Crew(run, jobs)

    def finish(stage: Any, artifact: Artifact) -> None:
        plan.finished[stage.name] = artifact
        board.say(stage.name, outcome(stage, artifact))

    def begin(stage: Any) -> None:
        board.begin(stage.name, f"{stages.index(stage) + 1}/{len(stages)}", describe(stage))
        plan.started.add(stage.name)
        try:
            if isinstance(stage, ReportStage):
                finish(stage, report(stage, plan.before(stage)))
                return
            there = standing(stage, plan.finished)
        except ValueError as error:
            plan.fail(stage, Failed("mistake", str(error)), board)
            return
        except (StoppedError, OSError) as error:
            plan.fail(stage, Failed("stop", str(error)), board)
            return
        if there is None:
            crew.give(stage, Task(stage, {name: plan.finished[name] for name in stage.inputs}))
        else:
            board.say(stage.name, "stands, skipped")
            finish(stage, there)

    try:
        while True:
            while (ready := plan.next(crew.busy, jobs)) is not None:
                begin(ready)
            if not crew.busy:
                break
            for stage, message in crew.hear():
                if isinstance(message, Artifact):
                    finish(stage, message)
                elif isinstance(message, Failed):
                    plan.fail(stage, message, board)
                elif isinstance(message, Said):
                    board.say(stage.name, message.text)
                else:
                    board.move(stage.name, message)
    finally:
        board.close()
        crew.dismiss()
    plan.check()
    return {stage.name: plan.finished[stage.name] for stage in stages}


@dataclass
class _Plan:
    """Which stages are finished, begun, failed, and which can be begun."""

    stages: tuple[Any, ...]
    finished: dict[str, Artifact] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)
    failed: dict[str, Failed] = field(default_factory=dict)

    def before(self, stage: StageSpec) -> dict[str, Artifact]:
        """The artifacts of all stages before one, in order."""
        names = [other.name for other in self.stages[: self.stages.index(stage)]]
        return {name: self.finished[name] for name in names if name in self.finished}

    def next(self, busy: Mapping[str, Any], jobs: int) -> Any | None:
        """The stage to begin now; None if there is none, or no process for it."""
        alone = any(isinstance(stage, ThroughputStage) for stage in busy.values())
        if len(busy) >= jobs or alone:
            return None
        ready = [stage for stage in self.stages if stage.name not in self.started and self._can_begin(stage)]
        beside = [stage for stage in ready if not isinstance(stage, ThroughputStage)]
        return next(iter(beside or ([] if busy else ready)), None)

    def _can_begin(self, stage: Any) -> bool:
        if isinstance(stage, ReportStage):
            before = {other.name for other in self.stages[: self.stages.index(stage)]}
            return before <= self.finished.keys() | self._lost() and not before.isdisjoint(self.finished)
        return all(name in self.finished for name in stage.inputs)

    def _lost(self) -> set[str]:
        """Stages that failed or need one that did; stages come after what they read."""
        lost = set(self.failed)
        for stage in self.stages:
            if not isinstance(stage, ReportStage) and not lost.isdisjoint(stage.inputs):
                lost.add(stage.name)
        return lost

    def fail(self, stage: Any, failed: Failed, board: "_Board") -> None:
        """Note that a stage did not work out."""
        self.failed[stage.name] = failed
        last = failed.text.strip().splitlines()[-1] if failed.kind == "fault" else failed.text
        board.say(stage.name, f"failed: {last}")

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if not self.failed:
            return
        left_out = [stage.name for stage in self.stages if stage.name not in self.started]
        if len(self.failed) == 1 and not left_out:
            raise next(iter(self.failed.values())).as_error()
        lines = [f"{name}: {failed.text.strip()}" for name, failed in self.failed.items()]
        lines += [f"not done, since they need what failed: {', '.join(left_out)}"] if left_out else []
        kinds = {failed.kind for failed in self.failed.values()}
        kind = next(iter(kinds)) if len(kinds) == 1 else "fault" if "fault" in kinds else "stop"
        raise Failed(kind, "\n".join(lines)).as_error()


@dataclass
class _Worker:
    """A process, the pipe to it, and the GPU that it sees, if it is one of several."""

    process: Any
    pipe: Connection
    gpu: str | None
    stage: Any = None


class _Crew:
    """The processes that do stages; they start when they are needed, and stay for the next stage."""

    def __init__(self, run: Run, jobs: int) -> None:
        self.run, self.jobs = run, jobs
        self.gpus = gpu_names()
        self.workers: list[_Worker] = []

    @property
    def busy(self) -> dict[str, Any]:
        """The stages that are being done, by name."""
        return {worker.stage.name: worker.stage for worker in self.workers if worker.stage is not None}

    def give(self, stage: Any, task: Task) -> None:
        """Let a process do a stage."""
        idle = [worker for worker in self.workers if worker.stage is None]
        busy = Counter(worker.gpu for worker in self.workers if worker.stage is not None)
        worker = min(idle, key=lambda worker: busy[worker.gpu]) if idle else self._hire()
        worker.stage = stage
        with suppress(BrokenPipeError):  # it was killed; `hear` finds out
            worker.pipe.send(task)

    def _hire(self) -> _Worker:
        context = get_context("spawn")
        mine, its = context.Pipe()
        process = context.Process(target=work, args=(its, self.run), daemon=False)
        taken = Counter(worker.gpu for worker in self.workers)
        gpu = min(self.gpus, key=lambda name: taken[name]) if len(self.gpus) > 1 else None
        # Ctrl-C reaches all processes of a terminal. One that is still importing must not answer with a traceback.
        can_ignore = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if can_ignore else None
        try:
            with seeing(gpu):
                process.start()
        finally:
            if can_ignore:
                signal.signal(signal.SIGINT, before)
        its.close()
        self.workers.append(_Worker(process, mine, gpu))
        return self.workers[-1]

    def hear(self) -> list[tuple[Any, Any]]:
        """Wait for messages; each with the stage that it is about. The end of a process is one that it `Failed`."""
        heard = []
        by_pipe = {worker.pipe: worker for worker in self.workers}
        for pipe in wait(list(by_pipe)):
            worker = by_pipe[pipe]  # type: ignore[index]
            stage = worker.stage
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                self.workers.remove(worker)
                worker.pipe.close()
                worker.process.join()
                message = Failed("stop", _explain_end(worker.process.exitcode))
            if isinstance(message, Artifact | Failed):
                worker.stage = None
            if isinstance(message, Failed) and message.kind == "fault":
                self._dismiss([worker])  # the GPU may answer it no more
            if stage is not None:
                heard.append((stage, message))
        return heard

    def dismiss(self) -> None:
        """End all processes: those at work too, as Ctrl-C would, and by force where that takes too long."""
        self._dismiss(list(self.workers))

    def _dismiss(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.process.terminate()
            worker.pipe.close()
        for worker in workers:
            worker.process.join(GRACE_SECONDS)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            if worker in self.workers:
                self.workers.remove(worker)


def _explain_end(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}, perhaps for lack of memory; the same command goes on, with fewer jobs"
    return f"its process ended with code {code}; the same command goes on"


class _Board:
    """What a person sees: each line with its stage's name before it, and on a terminal a bar for each stage."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.bars: dict[tuple[str, str], TaskID] = {}
        self.progress: Progress | None = None
        if reporter.console.is_terminal:
            self.progress = Progress(*COLUMNS, console=reporter.console, transient=True)
            self.progress.start()

    def begin(self, name: str, number: str, what: str) -> None:
        """A stage begins."""
        self.reporter.say(f"[bold]{number} {escape(name)}[/bold]  {escape(what)}")

    def say(self, name: str, text: str) -> None:
        """A line about a stage."""
        self.reporter.say(f"  {escape(name)}: {escape(text.strip())}")

    def move(self, name: str, moved: Moved) -> None:
        """A stage's bar has moved, or is gone."""
        if self.progress is None:
            return
        key = (name, moved.title)
        if moved.total is None:
            if key in self.bars:
                self.progress.remove_task(self.bars.pop(key))
            return
        if key not in self.bars:
            self.bars[key] = self.progress.add_task(f"{name}: {moved.title}", total=moved.total, note="")
        self.progress.update(self.bars[key], completed=moved.done, total=moved.total, note=moved.note)

    def close(self) -> None:
        """Take all bars away."""
        if self.progress is not None:
            self.progress.stop()


def threads_of_each(jobs: int) -> int:
    """CPU threads for each of so many processes."""
    return max(1, usable_cpus() // jobs)


def usable_cpus() -> int:
    """CPUs that this process may use; where the system does not say, all that there are."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1

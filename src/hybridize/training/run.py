"""What all ways to train have in common: freeze, widen, resume, run, put back, and say what was done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from hybridize.data.packing import PackedRows
from hybridize.spec.stages import TrainStage
from hybridize.training.checkpoints import CHECKPOINTS, find_checkpoint, remove_incomplete, step_of
from hybridize.training.core import Run, training_arguments
from hybridize.training.metrics import METRICS, MetricsFile
from hybridize.training.parameters import check_separate, choose_trainable, widen

# Settings that may differ from a checkpoint's: the run's course does not depend on them (but for rounding).
_FREE = {"kind", "name", "model", "rows_per_batch", "gradient_checkpointing", "save_every"}


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        steps: optimiser steps really done, those before a resume included; likewise all that follows.
        tokens: tokens seen; on-policy, the student's own answers included.
        loss_tokens: tokens that the loss was taken on: completions; in a fit, all tokens.
        seconds: of training, generation included; checkpoints and looks at held-out rows are not counted.
        final_loss_nats: mean over the last tenth of the steps, in nat per token; None for a fit.
        final_loss_relative: the same for a fit, in shares of the target's mean square; None for all others.
        num_trainable_parameters: how many numbers were trained.
        resumed_from_step: the step of the checkpoint that this call went on from; 0 if there was none.
        stopped: why training ended before its last step, in words; empty if it did not.
    """

    steps: int
    tokens: int
    loss_tokens: int
    seconds: float
    final_loss_nats: float | None
    final_loss_relative: float | None
    num_trainable_parameters: int
    resumed_from_step: int
    stopped: str


def identity_of(stage: TrainStage, *unused: str, **data: str) -> dict[str, Any]:
    """What decides a run's course: its checkpoints belong to no other.

    Args:
        stage: of a recipe.
        *unused: settings that this kind of stage does not read.
        **data: hashes of what it is trained on.
    """
    return stage.model_dump(mode="json", exclude=_FREE | set(unused)) | data


def rows_of(stage: TrainStage, rows: PackedRows) -> PackedRows:
    """The rows that a stage uses.

    Raises:
        ValueError: they are of another length than the stage's, or too few.
    """
    if rows.sequence_length != stage.sequence_length:
        raise ValueError(
            f"rows: they are of {rows.sequence_length} tokens, but the stage's sequence_length is "
            f"{stage.sequence_length}; pack them for the stage"
        )
    num_needed = stage.steps * rows_per_step(stage)
    if len(rows) < num_needed:
        raise ValueError(
            f"rows: there are {len(rows)}, but {stage.steps} steps of {stage.tokens_per_step} tokens take "
            f"{num_needed}; pack that many"
        )
    return rows.part(0, num_needed)


def rows_per_step(stage: TrainStage) -> int:
    """Packed rows of a step."""
    return stage.tokens_per_step // stage.sequence_length


def carry_out(
    student: Any,
    stage: TrainStage,
    out_dir: Path,
    identity: dict[str, Any],
    make: Callable[[Any, MetricsFile], Run],
    *,
    num_rows_per_step: int,
    teacher: Any = None,
    trained: nn.Module | None = None,
    kind: type[Any] = TrainingArguments,
    **settings: Any,
) -> TrainResult:
    """Train a model in place, from its last complete checkpoint on if there is one.

    Args:
        student: the model; left in evaluation mode on the training device, its parameters' flags as they were.
        stage: all settings.
        out_dir: gets `metrics.jsonl` and `checkpoints/`.
        identity: what the run is; see `identity_of`.
        make: makes the run from the Trainer's settings and the metrics file.
        num_rows_per_step: rows of a step.
        teacher: a model to learn from; moved to the training device, in evaluation mode.
        trained: the part of the student that is trained and widened; by default all of it.
        kind: the class of the Trainer's settings.
        **settings: further ones of that class.

    Raises:
        ValueError: what to train, the processes or the existing checkpoints do not go with the stage.
        DivergedError: loss, gradients or weights are no longer finite.
    """
    checkpoint = find_checkpoint(out_dir / CHECKPOINTS, identity)
    resumed_from = step_of(checkpoint) if checkpoint else 0
    with _restored(student):
        choose_trainable(student, stage.train, stage.freeze)
        trained = trained if trained is not None else student
        num_trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        widen(trained)
        if teacher is not None:
            check_separate(student, teacher)
        with _checkpointing(student, stage.gradient_checkpointing), _quiet():
            args = training_arguments(stage, out_dir, num_rows_per_step, kind, **settings)
            if args.process_index == 0:
                remove_incomplete(out_dir / CHECKPOINTS)
            metrics = MetricsFile(out_dir / METRICS, resumed_from, writes=args.process_index == 0)
            if teacher is not None:
                teacher.to(args.device).eval()
            run = make(args, metrics)
            if checkpoint and run.why_ended():
                run._load_from_checkpoint(str(checkpoint))  # it was killed right after its last step
            else:
                run.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            run.accelerator.free_memory()
            student.to(args.device)
    return _result(run, stage, num_trainable, resumed_from)


def _result(run: Run, stage: TrainStage, num_trainable: int, resumed_from: int) -> TrainResult:
    records = run.metrics.records
    losses = [record[run.loss_key] for record in records]
    final_loss = fmean(losses[-max(1, round(len(losses) / 10)) :])
    in_nats = run.loss_key == Run.loss_key
    last = records[-1]
    return TrainResult(
        steps=last["step"],
        tokens=last["tokens"],
        loss_tokens=last["loss_tokens"],
        seconds=run.seconds,
        final_loss_nats=final_loss if in_nats else None,
        final_loss_relative=None if in_nats else final_loss,
        num_trainable_parameters=num_trainable,
        resumed_from_step=resumed_from,
        stopped=run.why_ended() if last["step"] < stage.steps else "",
    )


@contextmanager
def _restored(student: Any) -> Iterator[None]:
    """Put back what training changes about a model besides its weights."""
    flags = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    use_cache = student.config.use_cache  # the Trainer turns it off, and it would be saved so
    try:
        yield
    finally:
        student.eval().zero_grad()
        student.config.use_cache = use_cache
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing; transformers renamed the model's methods for it after 5.17."""
    if not wanted:
        yield
        return
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if hasattr(model, f"{name}_enable"))
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing to the terminal: what matters is raised or recorded."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

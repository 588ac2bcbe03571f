"""Distillation of a student on packed rows, from its checkpoints on if there are any."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers.utils import logging

from hybridize.data.packing import PackedRows
from hybridize.spec.stages import DistillStage
from hybridize.training.checkpoints import CHECKPOINTS, find_checkpoint, remove_incomplete, step_of
from hybridize.training.metrics import METRICS, MetricsFile
from hybridize.training.parameters import check_separate, choose_trainable, widen
from hybridize.training.trainer import DistillTrainer, OnLog, training_arguments

# Settings that may differ from a checkpoint's: the run's course does not depend on them (but for rounding).
_FREE = {"kind", "name", "model", "rows_per_batch", "gradient_checkpointing", "save_every"}


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        steps: optimiser steps, those before a resume included; likewise all that follows.
        tokens: tokens seen.
        completion_tokens: tokens that the loss was taken on.
        seconds: of training, checkpoints not counted.
        final_loss_nats: mean over the last tenth of the steps, in nat per completion token.
        num_trainable_parameters: how many numbers were trained.
        resumed_from_step: the step of the checkpoint that this call went on from; 0 if there was none.
    """

    steps: int
    tokens: int
    completion_tokens: int
    seconds: float
    final_loss_nats: float
    num_trainable_parameters: int
    resumed_from_step: int


def distill(
    student: Any,
    teacher: Any,
    rows: PackedRows,
    stage: DistillStage,
    out_dir: str | Path,
    *,
    on_log: OnLog | None = None,
) -> TrainResult:
    """Train a student, in place, to follow a teacher's next-token distributions.

    Each step's loss is the mean divergence over all its completion tokens, however they are cut into batches.
    A call with the same arguments as one that was killed goes on from its last complete checkpoint and, on a
    CPU, ends with the same bits as if nothing had happened.

    Args:
        student: a causal language model. Its parameters become fp32; it is left in evaluation mode, on the
            training device. When resuming, its weights are replaced by the checkpoint's.
        teacher: another, of the same vocabulary. Moved to the training device, run in its own dtype, in
            evaluation mode; its weights do not change.
        rows: packed rows, at least `stage.steps` times those of a step; used in their order.
        stage: all settings.
        out_dir: gets `metrics.jsonl`, a line per step, and `checkpoints/`, the last two.
        on_log: called after each step with its record (`step`, `loss_nats`, `learning_rate`, `grad_norm`,
            `tokens` and `seconds` up to here) and the number of all steps.

    Raises:
        ValueError: the rows, the freezing or the existing checkpoints do not go with the stage.
        DivergedError: loss, gradients or weights are no longer finite.

    Source: reverse KL on the teacher's traces as in arXiv 2511.02651.
    """
    out_dir = Path(out_dir)
    rows = _rows_of(stage, rows)
    identity = stage.model_dump(mode="json", exclude=_FREE) | {"rows": rows.digest()}
    checkpoint = find_checkpoint(out_dir / CHECKPOINTS, identity)
    resumed_from = step_of(checkpoint) if checkpoint else 0
    flags = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    try:
        choose_trainable(student, stage.train, stage.freeze)
        num_trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
        widen(student)
        check_separate(student, teacher)
        if stage.gradient_checkpointing:
            _checkpointing(student, "enable")({"use_reentrant": False})
        with _quiet():
            args = training_arguments(stage, out_dir)
            if args.process_index == 0:
                remove_incomplete(out_dir / CHECKPOINTS)
            metrics = MetricsFile(out_dir / METRICS, resumed_from, writes=args.process_index == 0)
            teacher.to(args.device).eval()
            trainer = DistillTrainer(student, teacher, rows, stage, args, metrics, identity, on_log)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.accelerator.free_memory()
    finally:
        student.eval().zero_grad()
        if stage.gradient_checkpointing:
            _checkpointing(student, "disable")()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    losses = [record["loss_nats"] for record in metrics.records]
    stats = rows.stats
    return TrainResult(
        steps=stage.steps,
        tokens=stats["num_tokens"],
        completion_tokens=stats["num_completion_tokens"],
        seconds=trainer.seconds,
        final_loss_nats=fmean(losses[-max(1, round(len(losses) / 10)) :]),
        num_trainable_parameters=num_trainable,
        resumed_from_step=resumed_from,
    )


def _rows_of(stage: DistillStage, rows: PackedRows) -> PackedRows:
    """The rows that a stage uses."""
    if rows.sequence_length != stage.sequence_length:
        raise ValueError(
            f"rows: they are of {rows.sequence_length} tokens, but the stage's sequence_length is "
            f"{stage.sequence_length}; pack them for the stage"
        )
    num_needed = stage.steps * stage.tokens_per_step // stage.sequence_length
    if len(rows) < num_needed:
        raise ValueError(
            f"rows: there are {len(rows)}, but {stage.steps} steps of {stage.tokens_per_step} tokens take "
            f"{num_needed}; pack that many"
        )
    return rows.part(0, num_needed)


def _checkpointing(model: Any, verb: str) -> Any:
    """The model's method that turns gradient checkpointing on or off; transformers renamed it after 5.17."""
    return getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}")


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

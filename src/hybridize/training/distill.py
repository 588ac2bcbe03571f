"""Distillation of a student on packed rows, from its checkpoints on if there are any."""

from pathlib import Path
from typing import Any

from hybridize.data.packing import PackedRows
from hybridize.spec.stages import DistillStage
from hybridize.training.core import OnLog, Run, packed_progress
from hybridize.training.metrics import MetricsFile
from hybridize.training.run import TrainResult, carry_out, identity_of, rows_of, rows_per_step
from hybridize.training.trainer import DistillTrainer


def distill(
    student: Any,
    teacher: Any,
    rows: PackedRows,
    stage: DistillStage,
    out_dir: str | Path,
    *,
    heldout: PackedRows | None = None,
    on_log: OnLog | None = None,
) -> TrainResult:
    """Train a student, in place, to follow a teacher's next-token distributions.

    Each step's loss is the mean divergence over all its completion tokens, however they are cut into batches.
    A call with the same arguments as one that was killed goes on from its last complete checkpoint and, on a
    CPU, ends with the same bits as if nothing had happened.

    With `stage.stop`, the same divergence is measured every so many steps on rows held out, in evaluation mode; the
    records of these steps have it as `heldout_nats`. The learning rate follows the schedule of all `stage.steps`.

    Args:
        student: a causal language model. Its parameters become fp32; it is left in evaluation mode, on the
            training device. When resuming, its weights are replaced by the checkpoint's.
        teacher: another, of the same vocabulary. Moved to the training device, run in its own dtype, in
            evaluation mode; its weights do not change.
        rows: packed rows, at least `stage.steps` times those of a step; used in their order.
        stage: all settings.
        out_dir: gets `metrics.jsonl`, a line per step, and `checkpoints/`, the last two.
        heldout: at least `stage.stop.heldout_rows` rows of their own; not looked at without `stage.stop`.
        on_log: called after each step with its record (`step`, `loss_nats`, `learning_rate`, `grad_norm`;
            `tokens`, `loss_tokens` and `seconds` up to here) and the number of all steps.

    Raises:
        ValueError: the rows, the freezing or the existing checkpoints do not go with the stage.
        DivergedError: loss, gradients or weights are no longer finite.

    Source: reverse KL on the teacher's traces as in arXiv 2511.02651.
    """
    rows = rows_of(stage, rows)
    heldout = _heldout_of(stage, heldout)
    data = {"rows": rows.digest()} | ({"heldout": heldout.digest()} if heldout is not None else {})
    identity = identity_of(stage, **data)

    def make(args: Any, metrics: MetricsFile) -> Run:
        return DistillTrainer(
            student,
            teacher,
            stage,
            stop=stage.stop,
            heldout=heldout,
            metrics=metrics,
            identity=identity,
            on_log=on_log,
            progress=packed_progress(rows, rows_per_step(stage)),
            args=args,
            train_dataset=rows,
            data_collator=rows.collate,
        )

    return carry_out(
        student, stage, Path(out_dir), identity, make, num_rows_per_step=rows_per_step(stage), teacher=teacher
    )


def _heldout_of(stage: DistillStage, heldout: PackedRows | None) -> PackedRows | None:
    """The rows that the stage looks at to know when to stop."""
    if stage.stop is None:
        return None
    num_rows = 0 if heldout is None else len(heldout)
    if heldout is None or num_rows < stage.stop.heldout_rows:
        raise ValueError(
            f"heldout: there are {num_rows} rows, but stop.heldout_rows is {stage.stop.heldout_rows}; hold out that "
            "many, or leave stop out"
        )
    heldout = heldout.part(0, stage.stop.heldout_rows)
    if not heldout.completion.any():
        raise ValueError("heldout: it has no completion token to measure the loss at; hold out more rows")
    return heldout

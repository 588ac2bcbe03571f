"""The Hugging Face Trainer with a teacher: the loss, the log, and the guard against a run that diverges."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hybridize.data.packing import PackedRows
from hybridize.spec.base import StoppedError
from hybridize.spec.stages import DistillStage
from hybridize.training.checkpoints import CHECKPOINTS, keep_last, last_checkpoint, mark_complete
from hybridize.training.divergence import batch_divergence
from hybridize.training.metrics import MetricsFile
from hybridize.training.parameters import decays

OnLog = Callable[[dict[str, Any], int], None]


class DivergedError(StoppedError):
    """The loss, the gradients or the weights are no longer finite; the message says where and what to try."""


class DistillTrainer(Trainer):
    """Trains a student to follow a teacher over packed rows, in their order, once.

    Args:
        student: the model to train.
        teacher: frozen, in evaluation mode, on the training device.
        rows: exactly the rows of all steps.
        stage: kind and temperature of the loss.
        args: see `training_arguments`.
        metrics: where each step's record goes.
        identity: what the run is, for its checkpoints.
        on_log: called with each record and the number of all steps.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        rows: PackedRows,
        stage: DistillStage,
        args: TrainingArguments,
        metrics: MetricsFile,
        identity: dict[str, Any],
        on_log: OnLog | None = None,
    ) -> None:
        super().__init__(model=student, args=args, train_dataset=rows, data_collator=rows.collate)
        # The loss is normalised over the whole step here; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.teacher, self.stage, self.metrics, self.on_log = teacher, stage, metrics, on_log
        rows_per_step = stage.tokens_per_step // stage.sequence_length
        self.tokens_by_step = rows.offsets[rows_per_step::rows_per_step].tolist()
        self.seconds = metrics.records[-1]["seconds"] if metrics.records else 0.0
        self.step_began = time.perf_counter()
        self.remove_callback(PrinterCallback)
        self.add_callback(_Marks(self, identity))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """A step's batches, and how many valid positions they have, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_valid = torch.stack([batch["valid"].sum() for batch in batches]).sum().to(device)
        if self.args.world_size > 1:
            num_valid = self.accelerator.gather(num_valid).sum()
        return batches, num_valid

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The batch's share of the step's mean divergence: its sum over the step's number of positions."""
        assert num_items_in_batch is not None
        assert not return_outputs
        student = self.accelerator.unwrap_model(model)

        def total() -> Tensor:
            return batch_divergence(student, self.teacher, inputs, self.stage.loss, self.stage.temperature)

        loss = total() if model is student else _call_within(model, student, total)
        # Processes average their gradients, but the count is of all of them.
        return loss * self.args.world_size / num_items_in_batch.clamp(min=1)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Names of the parameters that weight decay acts on."""
        return [name for name, parameter in model.named_parameters() if decays(name, parameter)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a step, or stop the run if it went wrong; called after each step and before its checkpoint.

        Raises:
            DivergedError: the loss, the gradient norm or a weight about to be saved is not finite.
        """
        if "loss" not in logs:
            return  # the Trainer's summary at the end
        step = self.state.global_step
        self.seconds += time.perf_counter() - self.step_began
        record = {
            "step": step,
            "loss_nats": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "tokens": self.tokens_by_step[step - 1],
            "seconds": round(self.seconds, 3),
        }
        self._check_finite(record)
        self.metrics.append(record)
        if self.on_log and self.is_world_process_zero():
            self.on_log(record, self.args.max_steps)

    def _check_finite(self, record: dict[str, Any]) -> None:
        for key, name in (("loss_nats", "loss"), ("grad_norm", "gradient norm")):
            if not np.isfinite(record[key]):
                raise DivergedError(self._explain(record, f"the {name} is {record[key]}"))
        if self.control.should_save:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if not torch.stack([parameter.detach().isfinite().all() for parameter in trained]).all():
                raise DivergedError(self._explain(record, "a weight is not finite"))

    def _explain(self, record: dict[str, Any], what: str) -> str:
        peak, rate = self.args.learning_rate, record["learning_rate"]
        last = "it was the first step"
        if self.metrics.records:
            before = self.metrics.records[-1]
            last = f"the loss was {before['loss_nats']:.4g} nat per token at step {before['step']}"
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        saved = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"
        return (
            f"step {record['step']} of {self.args.max_steps}: {what} (learning rate {rate:.2e}; {last}). "
            f"Training stopped, the step was not saved, and {saved}. Try a lower learning_rate (say "
            f"{peak / 3:.0e} in place of {peak:.0e}), more warmup_steps or a smaller max_grad_norm, and "
            f"remove {self.args.output_dir} to start afresh"
        )


class _Marks(TrainerCallback):
    """Starts each step's clock; marks each checkpoint complete once it is, and removes the old ones."""

    def __init__(self, trainer: DistillTrainer, identity: dict[str, Any]) -> None:
        self.trainer, self.identity = trainer, identity

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.save_steps = args.save_steps  # a resumed run may ask for another interval

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_began = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes files of its own
        if state.is_world_process_zero:
            self.trainer.metrics.sync()
            folder = Path(args.output_dir)
            mark_complete(folder / f"checkpoint-{state.global_step}", self.identity)
            keep_last(folder)


def training_arguments(stage: DistillStage, out_dir: Path) -> TrainingArguments:
    """The Trainer's settings for a stage.

    Args:
        stage: of a recipe.
        out_dir: the run's folder.

    Raises:
        ValueError: the step's batches cannot be dealt out evenly to the processes.
    """
    on_gpu = torch.cuda.is_available()
    constant = "constant_with_warmup" if stage.warmup_steps else "constant"
    args = TrainingArguments(
        output_dir=str(out_dir / CHECKPOINTS),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.rows_per_batch,
        train_sampling_strategy="sequential",
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        lr_scheduler_type=constant if stage.schedule == "constant" else stage.schedule,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        ddp_find_unused_parameters=False,
        seed=stage.seed,
        use_cpu=not on_gpu,
        save_steps=stage.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
    )
    args.gradient_accumulation_steps, rest = divmod(stage.accumulation, args.world_size)
    if rest:
        raise ValueError(
            f"tokens_per_step {stage.tokens_per_step}: {stage.accumulation} batches of "
            f"{stage.rows_per_batch} rows do not divide among {args.world_size} processes; use a multiple of "
            f"{args.world_size * stage.rows_per_batch * stage.sequence_length}"
        )
    if args.n_gpu > 1:
        args._n_gpu = 1  # one process drives one GPU; start more processes (torchrun) for more
    return args


def _call_within(wrapper: Any, student: Any, function: Callable[[], Tensor]) -> Tensor:
    """Call a function as if it were the student's forward, so that what wraps the student takes part.

    DistributedDataParallel and its like prepare gradients in their own forward; those of a call past it are
    not summed over processes.
    """
    had = student.__dict__.get("forward")

    def restore() -> None:
        if had is None:
            del student.forward
        else:
            student.forward = had

    def forward() -> Tensor:
        restore()
        return function()

    student.forward = forward
    try:
        return wrapper()
    finally:
        if student.__dict__.get("forward") is forward:
            restore()

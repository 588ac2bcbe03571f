"""The core of every training run: the Hugging Face Trainer with a log of its own and a guard against divergence.

A way to train is a subclass with a loss. It adds nothing to what makes a run resume exactly: the order of the data,
the record of each step and the marks on checkpoints are settled here.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hybridize.data.packing import PackedRows
from hybridize.spec.base import StoppedError
from hybridize.spec.stages import TrainStage
from hybridize.training.checkpoints import CHECKPOINTS, keep_last, last_checkpoint, mark_complete
from hybridize.training.metrics import MetricsFile
from hybridize.training.parameters import decays

OnLog = Callable[[dict[str, Any], int], None]


class DivergedError(StoppedError):
    """The loss, the gradients or the weights are no longer finite; the message says where and what to try."""


class Run(Trainer):
    """Trains a model over its data, in order, once.

    A subclass has a `compute_loss` whose values, summed over a step's batches and averaged over processes, are the
    step's loss: a sum over positions divided by `num_items_in_batch`, which `count` defines.

    Args:
        metrics: where each step's record goes.
        identity: what the run is, for its checkpoints.
        on_log: called with each record and the number of all steps.
        progress: after each step, how many tokens were seen and how many the loss was taken on; empty if the
            subclass knows.
        **trainer: the Trainer's own arguments.
    """

    loss_key = "loss_nats"
    loss_unit = "nat per token"

    def __init__(
        self,
        *,
        metrics: MetricsFile,
        identity: dict[str, Any],
        on_log: OnLog | None = None,
        progress: Sequence[tuple[int, int]] = (),
        **trainer: Any,
    ) -> None:
        super().__init__(**trainer)
        # The loss is normalised over the whole step here; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.metrics, self.on_log, self.progress = metrics, on_log, progress
        self.seconds = metrics.records[-1]["seconds"] if metrics.records else 0.0
        self.step_began = time.perf_counter()
        self.remove_callback(PrinterCallback)
        self.add_callback(_Marks(self, identity))

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many positions of a batch the loss is a mean over."""
        return batch["valid"].sum()

    def prepare(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What a step trains on, made of what the data set gives for it."""
        return batches

    def seen(self, step: int) -> tuple[int, int]:
        """Tokens seen after a step, and those of them that the loss was taken on."""
        return self.progress[step - 1]

    def details(self) -> dict[str, Any]:
        """Further entries of the step's record; asked for once after each step, on all processes."""
        return {}

    def after_step(self, record: dict[str, Any]) -> None:
        """Look at a step's record, perhaps add to it, perhaps end the run."""

    def why_ended(self) -> str:
        """Why the run is over before its last step; empty if it is not."""
        return ""

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """A step's batches, and how many positions the loss is a mean over, over all processes."""
        self.step_began = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.prepare(batches)
        num_positions = torch.stack([self.count(batch) for batch in batches]).sum().to(device)
        return batches, self.over_processes(num_positions)

    def over_processes(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value

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
        tokens, loss_tokens = self.seen(step)
        record = {
            "step": step,
            self.loss_key: float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "tokens": tokens,
            "loss_tokens": loss_tokens,
            "seconds": round(self.seconds, 3),
            **self.details(),
        }
        self.check_finite(record, self.loss_key, "loss")
        self.check_finite(record, "grad_norm", "gradient norm")
        self.after_step(record)
        self._check_weights(record)
        self.metrics.append(record)
        if self.on_log and self.is_world_process_zero():
            self.on_log(record, self.args.max_steps)

    def check_finite(self, record: dict[str, Any], key: str, name: str) -> None:
        """Raise a `DivergedError` unless an entry of a record is finite."""
        if not np.isfinite(record[key]):
            raise DivergedError(self._explain(record, f"the {name} is {record[key]}"))

    def _check_weights(self, record: dict[str, Any]) -> None:
        if self.control.should_save:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if not torch.stack([parameter.detach().isfinite().all() for parameter in trained]).all():
                raise DivergedError(self._explain(record, "a weight is not finite"))

    def _explain(self, record: dict[str, Any], what: str) -> str:
        peak, rate = self.args.learning_rate, record["learning_rate"]
        last = "it was the first step"
        if self.metrics.records:
            before = self.metrics.records[-1]
            last = f"the loss was {before[self.loss_key]:.4g} {self.loss_unit} at step {before['step']}"
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        saved = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"
        return (
            f"step {record['step']} of {self.args.max_steps}: {what} (learning rate {rate:.2e}; {last}). "
            f"Training stopped, the step was not saved, and {saved}. Try a lower learning_rate (say "
            f"{peak / 3:.0e} in place of {peak:.0e}), more warmup_steps or a smaller max_grad_norm, and "
            f"remove {self.args.output_dir} to start afresh"
        )


class _Marks(TrainerCallback):
    """Marks each checkpoint complete once it is, and removes the old ones."""

    def __init__(self, run: Run, identity: dict[str, Any]) -> None:
        self.run, self.identity = run, identity

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.save_steps = args.save_steps  # a resumed run may ask for another interval

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes files of its own
        if state.is_world_process_zero:
            self.run.metrics.sync()
            folder = Path(args.output_dir)
            mark_complete(folder / f"checkpoint-{state.global_step}", self.identity)
            keep_last(folder)


def training_arguments(
    stage: TrainStage, out_dir: Path, rows_per_step: int, kind: type[Any] = TrainingArguments, **settings: Any
) -> Any:
    """The Trainer's settings for a stage.

    Args:
        stage: of a recipe.
        out_dir: the run's folder.
        rows_per_step: rows of a step, over all processes.
        kind: the class of the settings.
        **settings: further ones of that class.

    Raises:
        ValueError: the step's batches cannot be dealt out evenly to the processes.
    """
    on_gpu = torch.cuda.is_available()
    constant = "constant_with_warmup" if stage.warmup_steps else "constant"
    args = kind(
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
        **settings,
    )
    accumulation = rows_per_step // stage.rows_per_batch
    args.gradient_accumulation_steps, rest = divmod(accumulation, args.world_size)
    if rest:
        raise ValueError(
            f"rows_per_batch {stage.rows_per_batch}: a step's {accumulation} batches do not divide among "
            f"{args.world_size} processes; let a step have a multiple of {args.world_size * stage.rows_per_batch} rows"
        )
    if args.n_gpu > 1:
        args._n_gpu = 1  # one process drives one GPU; start more processes (torchrun) for more
    return args


def packed_progress(rows: PackedRows, rows_per_step: int) -> list[tuple[int, int]]:
    """Tokens seen after each step over packed rows, and completion tokens among them."""
    ends = rows.offsets[rows_per_step::rows_per_step]
    completions = np.concatenate([[0], rows.completion.cumsum()])[ends]
    return list(zip(ends.tolist(), completions.tolist(), strict=True))


def call_within(wrapper: Any, model: Any, function: Callable[[], Tensor]) -> Tensor:
    """Call a function as if it were the model's forward, so that what wraps the model takes part.

    DistributedDataParallel and its like prepare gradients in their own forward; those of a call past it are
    not summed over processes.
    """
    if wrapper is model:
        return function()
    had = model.__dict__.get("forward")

    def restore() -> None:
        if had is None:
            del model.forward
        else:
            model.forward = had

    def forward() -> Tensor:
        restore()
        return function()

    model.forward = forward
    try:
        return wrapper()
    finally:
        if model.__dict__.get("forward") is forward:
            restore()

"""Fine-tuning on traces by TRL's SFTTrainer, completion only, on the rows that distillation uses.

TRL's is the loss: it runs the base model and scores the next tokens a tile at a time, so that logits of all positions
never exist. The data path is ours in front of it. Its own would pack alike (`data/packing.py` calls its
`pack_dataset`), but needs the data set whole before the first step, shuffles by a generator of its own, and would cut
the batches differently for every number of processes. So rows are packed beforehand, and TRL is handed tokens, labels
and positions that restart with each document. A test holds the loss against that of TRL's path from prompt and
completion.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hybridize.data.packing import PackedRows
from hybridize.spec.stages import SftStage
from hybridize.training.core import OnLog, Run, packed_progress
from hybridize.training.divergence import decoder_inputs
from hybridize.training.metrics import MetricsFile
from hybridize.training.run import TrainResult, carry_out, identity_of, rows_of, rows_per_step

_IGNORED = -100  # the label of a token that is not to be predicted, in transformers and TRL


class FinetuneTrainer(Run, SFTTrainer):
    """TRL's SFTTrainer as a run of ours.

    Args:
        model: the model to train.
        rows: exactly the rows of all steps.
        **run: see `Run`.
    """

    def __init__(self, model: Any, rows: PackedRows, **run: Any) -> None:
        super().__init__(
            model=model,
            train_dataset=_as_dataset(rows),
            data_collator=lambda batch: collate(model, rows, batch),
            processing_class=PreTrainedTokenizerBase(),  # asked for, though rows are tokens already
            **run,
        )
        self.processing_class = None  # nor is it to be saved

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens of a batch are to be predicted."""
        return (batch["labels"] != _IGNORED).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The batch's share of the step's mean cross-entropy, as TRL computes it."""
        device = inputs["input_ids"].device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return SFTTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def details(self) -> dict[str, Any]:
        """Forget TRL's own measures, which it gathers until it logs them."""
        self._metrics["train"].clear()
        return {}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints get no card."""

    def _send_telemetry(self) -> None:
        """Nobody is told that a model is trained here."""


def finetune(
    model: Any,
    rows: PackedRows,
    stage: SftStage,
    out_dir: str | Path,
    *,
    on_log: OnLog | None = None,
) -> TrainResult:
    """Fine-tune a model, in place, to write the completions of packed rows.

    Each step's loss is the mean cross-entropy over all its completion tokens, however they are cut into batches; in
    nat per token. Resumes like `distill`, with the same bits on a CPU. On a GPU the model runs in bf16 autocast.

    Args:
        model: a hybrid, or the teacher itself as a control. Its parameters become fp32; it is left in evaluation
            mode, on the training device. When resuming, its weights are replaced by the checkpoint's.
        rows: packed rows, at least `stage.steps` times those of a step; used in their order.
        stage: all settings.
        out_dir: gets `metrics.jsonl`, a line per step, and `checkpoints/`, the last two.
        on_log: called after each step with its record, as by `distill`, and the number of all steps.

    Raises:
        ValueError: the rows, the freezing or the existing checkpoints do not go with the stage.
        DivergedError: loss, gradients or weights are no longer finite.
    """
    rows = rows_of(stage, rows)
    identity = identity_of(stage, rows=rows.digest())

    def make(args: Any, metrics: MetricsFile) -> Run:
        return FinetuneTrainer(
            model,
            rows,
            metrics=metrics,
            identity=identity,
            on_log=on_log,
            progress=packed_progress(rows, rows_per_step(stage)),
            args=args,
        )

    with _unpatched(model):
        return carry_out(
            model,
            stage,
            Path(out_dir),
            identity,
            make,
            num_rows_per_step=rows_per_step(stage),
            kind=SFTConfig,
            bf16=False,  # see compute_loss
            gradient_checkpointing=None,  # turned on in the model where the stage wants it
            completion_only_loss=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )


def collate(model: Any, rows: PackedRows, batch: Sequence[Any]) -> dict[str, Tensor]:
    """What TRL hands to a model: `input_ids`, `position_ids` and `labels`, [R, L] or in one long row.

    Args:
        model: which of the two it wants.
        rows: what the batch is of.
        batch: some of its rows.
    """
    tensors = rows.collate(batch)
    labels = torch.full_like(tensors["input_ids"], _IGNORED)
    labels[:, 1:] = torch.where(tensors["valid"][:, :-1], tensors["input_ids"][:, 1:], _IGNORED)
    inputs = decoder_inputs(model, tensors)
    return {
        "input_ids": inputs["input_ids"],
        "position_ids": inputs["position_ids"],
        "labels": labels.reshape(inputs["input_ids"].shape),
    }


def _as_dataset(rows: PackedRows) -> Any:
    """Rows as TRL wants them, sharing their memory."""
    import pyarrow as pa
    from datasets import Dataset

    columns = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "completion": rows.completion}
    borders = pa.array(rows.offsets, type=pa.int64())
    lists = {name: pa.LargeListArray.from_arrays(borders, pa.array(column)) for name, column in columns.items()}
    return Dataset(pa.table(lists)).with_format("numpy")


@contextmanager
def _unpatched(model: Any) -> Iterator[None]:
    """Take off what TRL puts on a model: another forward, and tags."""
    before = {name: vars(model)[name] for name in ("forward", "model_tags") if name in vars(model)}
    try:
        yield
    finally:
        for name in ("forward", "model_tags"):
            vars(model).pop(name, None)
        vars(model).update(before)

"""Trains a student to follow a teacher: the divergence as the loss, and the held-out loss that may end it early."""

from typing import Any

import torch
from torch import Tensor

from hybridize.data.packing import PackedRows
from hybridize.spec.stages import DistillStage, OnPolicyStage, StopSpec
from hybridize.training.core import Run, call_within
from hybridize.training.divergence import batch_divergence, heldout_divergence
from hybridize.training.stopping import HELDOUT, is_due, why_stop


class DistillTrainer(Run):
    """Trains a student to follow a teacher.

    Args:
        student: the model to train.
        teacher: frozen, in evaluation mode, on the training device.
        stage: kind and temperature of the loss.
        stop: when to end before the last step.
        heldout: rows that `stop` looks at.
        **run: see `Run`.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        stage: DistillStage | OnPolicyStage,
        *,
        stop: StopSpec | None = None,
        heldout: PackedRows | None = None,
        **run: Any,
    ) -> None:
        super().__init__(model=student, **run)
        self.teacher, self.stage, self.stop, self.heldout = teacher, stage, stop, heldout

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

        loss = call_within(model, student, total)
        # Processes average their gradients, but the count is of all of them.
        return loss * self.args.world_size / num_items_in_batch.clamp(min=1)

    def after_step(self, record: dict[str, Any]) -> None:
        """Measure the loss on the rows held out when it is time, and end the run if it says so.

        Raises:
            DivergedError: it is not finite.
        """
        if not is_due(self.stop, record["step"]):
            return
        record[HELDOUT] = self._heldout_loss()
        self.check_finite(record, HELDOUT, "loss on the rows held out")
        if why_stop(self.stop, [*self.metrics.records, record]):
            self.control.should_save = self.control.should_training_stop = True

    def why_ended(self) -> str:
        """What the rule for stopping makes of the records."""
        return why_stop(self.stop, self.metrics.records)

    def _heldout_loss(self) -> float:
        assert self.heldout is not None
        loss = heldout_divergence(
            self.accelerator.unwrap_model(self.model),
            self.teacher,
            self.heldout,
            self.stage.loss,
            temperature=self.stage.temperature,
            rows_per_batch=self.stage.rows_per_batch,
        )
        if self.args.world_size == 1:
            return loss
        # All processes have measured the same, but for rounding; they must agree on when to stop.
        return self.accelerator.reduce(torch.tensor(loss, device=self.args.device), "mean").item()

"""The few training steps of a trial.

Adam (0.9, 0.95), gradients clipped to norm 1, linear warm-up over the first tenth of the steps, then a cosine down to
a tenth of the learning rate. What is trained is fp32; in a half-precision model the products are made in its precision
(autocast).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.importance.rows import Rows
from hybridize.importance.trials import OnStep, check_finite
from hybridize.spec.stages import RankStage

_WARMUP = 0.1
_FLOOR = 0.1


def rate_at(step: int, stage: RankStage) -> float:
    """The learning rate of a step, 0-based: warm-up, then cosine."""
    warmup = math.ceil(_WARMUP * stage.steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, stage.steps - warmup)
    return stage.learning_rate * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * share)) / 2)


def make_optimizer(parameters: Sequence[Tensor], stage: RankStage) -> torch.optim.Optimizer:
    """The optimiser of a trial."""
    return torch.optim.Adam(parameters, lr=stage.learning_rate, betas=(0.9, 0.95))


def take_step(
    optimizer: torch.optim.Optimizer, step: int, stage: RankStage, groups: Sequence[Sequence[Tensor]]
) -> None:
    """Clip gradients, group by group, update at the step's learning rate, and forget the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step, stage)
    for tensors in groups:
        nn.utils.clip_grad_norm_(tensors, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train(
    parameters: Sequence[Tensor],
    batches: Sequence[Rows],
    loss_of: Callable[[Rows], Tensor],
    stage: RankStage,
    layer: int,
    on_step: OnStep,
) -> None:
    """Train for one step per batch.

    Args:
        parameters: what to train; nothing, if there are none.
        batches: in their order.
        loss_of: a batch's loss, summed over its valid positions.
        stage: the learning rate.
        layer: whose trial it is, for errors.
        on_step: called after each step.

    Raises:
        StoppedError: a loss is not finite.
    """
    optimizer = make_optimizer(parameters, stage) if parameters else None
    for step, rows in enumerate(batches):
        if optimizer is not None:
            loss = loss_of(rows) / max(rows.num_valid, 1)
            check_loss(float(loss.detach()), layer, f"at step {step + 1}", stage)
            loss.backward()
            take_step(optimizer, step, stage, [parameters])
        on_step(step + 1)


@torch.no_grad()
def measure(heldout: Sequence[Rows], loss_of: Callable[[Rows], Any], stage: RankStage, layer: int) -> float:
    """Loss over all held-out rows, nat per token.

    Raises:
        StoppedError: it is not finite.
    """
    total = sum(float(loss_of(rows)) for rows in heldout)
    return check_loss(total / sum(rows.num_valid for rows in heldout), layer, "on the held-out rows", stage)


def check_loss(loss: float, layer: int, when: str, stage: RankStage) -> float:
    """Give a loss back, or raise a `StoppedError` if it is not finite."""
    remedy = "check that teacher and model are sound"
    if stage.method in ("mmr", "kl"):
        remedy = f"lower learning_rate (now {stage.learning_rate:g}), or {remedy}"
    return check_finite(loss, layer, f"the loss is {{}} {when}", remedy)


def autocast(model: Any) -> torch.autocast:
    """Half-precision products in a half-precision model, whose mixers in training are fp32; else nothing."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(
        model.device.type, dtype=model.dtype if half else torch.bfloat16, enabled=half, cache_enabled=False
    )


def check_batches(batches: Sequence[Any], stage: RankStage) -> None:
    """Raise a `ValueError` unless there is a batch for each step."""
    if len(batches) != stage.steps:
        raise ValueError(f"batches: {len(batches)} are given for {stage.steps} steps; give one for each step")

"""What all stages have, and the names that they refer to one another by."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from hybridize.spec.base import Spec
from hybridize.spec.data import DataSpec, TracesDataSpec
from hybridize.spec.mixers import Mamba1Spec, MixerSpec, parse_mixer

Init = Literal["aligned", "neutral", "attention_gate", "published", "random"]
Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Schedule = Literal["cosine", "constant", "linear"]

TEACHER = "teacher"
"""The name under which stages refer to the recipe's teacher."""


class StageSpec(Spec):
    """What all stages have: a name, which is also the name of the folder of its results."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that this stage reads, the teacher's included."""
        return ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the earlier stages whose results this one reads."""
        return tuple(name for name in self.models if name != TEACHER)


class MixedStage(StageSpec):
    """A stage that puts a mixer somewhere.

    Attributes:
        mixer: by its name, or as a mapping with its sizes.
        init: how it starts from the attention that it replaces (see `hybridize.transfer.plan_transfer`).
    """

    mixer: MixerSpec = Field(default_factory=Mamba1Spec)
    init: Init = "aligned"

    @field_validator("mixer", mode="before")
    @classmethod
    def _mixer_by_name(cls, value: object) -> object:
        return parse_mixer(value) if isinstance(value, str) else value


class DataStage(StageSpec):
    """A stage that reads text.

    Attributes:
        data: instead of the recipe's; may be the result of an earlier `traces` stage.
        seed: of the order of the data and of what is drawn.
    """

    data: DataSpec | None = None
    seed: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """The models, and the traces if it reads any."""
        traces = (self.data.stage,) if isinstance(self.data, TracesDataSpec) else ()
        return (*super().inputs, *traces)


class TrainStage(DataStage):
    """A stage that trains a model on packed rows.

    Attributes:
        model: the stage that made the model.
        steps: optimiser steps.
        tokens_per_step: tokens of a step; a multiple of sequence_length. The paper: 64 x 16384.
        sequence_length: tokens of a packed row. The paper: 16384.
        rows_per_batch: rows computed at a time; the rest of the step's rows is accumulated.
        learning_rate: peak. The paper: 5e-6, for a 15B model.
        warmup_steps: steps of linear warm-up.
        schedule: of the learning rate after that.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: gradients are clipped to this norm.
        train: `all` weights (the paper), or the new `mixers` only.
        freeze: parts of tensor names to keep frozen in addition.
        gradient_checkpointing: trade time for memory.
        save_every: steps between checkpoints to resume from.
    """

    model: str
    steps: int = Field(gt=0)
    tokens_per_step: int = Field(default=64 * 16384, gt=0)
    sequence_length: int = Field(default=16384, gt=0)
    rows_per_batch: int = Field(default=1, gt=0)
    learning_rate: float = Field(default=5e-6, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Schedule = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    train: Literal["all", "mixers"] = "all"
    freeze: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    save_every: int = Field(default=100, gt=0)

    @model_validator(mode="after")
    def _whole_rows(self) -> Self:
        rows, rest = divmod(self.tokens_per_step, self.sequence_length)
        if rest or rows % self.rows_per_batch:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} is not a whole number of batches of {self.rows_per_batch} "
                f"rows of {self.sequence_length} tokens; use a multiple of {self.rows_per_batch * self.sequence_length}"
            )
        return self

    @property
    def accumulation(self) -> int:
        """Batches accumulated to a step."""
        return self.tokens_per_step // (self.sequence_length * self.rows_per_batch)

    @property
    def models(self) -> tuple[str, ...]:
        """The model to train."""
        return (self.model,)


def as_stage(kind: str, **given: Any) -> Any:
    """A before-validator's helper: a stage's settings that stand inside another, where names do not matter."""

    def complete(value: object) -> object:
        return {"name": kind, "kind": kind, **given, **value} if isinstance(value, dict) else value

    return complete

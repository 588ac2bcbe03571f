"""What a recipe can do, one spec per kind of stage. Defaults are the paper's (arXiv 2511.02651) where it has one."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from hybridize.spec.base import Spec
from hybridize.spec.data import MAX_LEVEL, TASK_NAMES, check_tasks
from hybridize.spec.mixers import AttentionSpec, Mamba1Spec, MixerSpec, parse_mixer

Init = Literal["aligned", "published", "random"]
Divergence = Literal["reverse_kl", "forward_kl", "jsd"]

TEACHER = "teacher"
"""The name under which stages refer to the recipe's teacher."""

_NAME = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


class StageSpec(Spec):
    """What all stages have: a name, which is also the name of the folder of its results."""

    name: str = _NAME

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the earlier stages whose results this one reads."""
        return ()


class MixedStage(StageSpec):
    """A stage that puts a mixer somewhere."""

    mixer: MixerSpec = Field(default_factory=Mamba1Spec)
    init: Init = "aligned"

    @field_validator("mixer", mode="before")
    @classmethod
    def _mixer_by_name(cls, value: object) -> object:
        return parse_mixer(value) if isinstance(value, str) else value


class RankStage(MixedStage):
    """Rank the teacher's attention layers, least important first.

    Attributes:
        method: `mmr` swaps one layer at a time and trains it for a few steps (the paper's), `uniform` and
            `random` are the controls.
        steps: training steps per layer. The paper: 100.
        tokens_per_step: tokens of a step.
        sequence_length: tokens of a packed row.
        heldout_rows: rows that the loss is measured on, before and after; never trained on.
        learning_rate: of the swapped mixer, Adam.
        seed: of the data and the draws.
    """

    kind: Literal["rank"] = "rank"
    method: Literal["mmr", "uniform", "random"] = "mmr"
    steps: int = Field(default=100, gt=0)
    tokens_per_step: int = Field(default=16384, gt=0)
    sequence_length: int = Field(default=16384, gt=0)
    heldout_rows: int = Field(default=8, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _whole_rows(self) -> Self:
        if self.tokens_per_step % self.sequence_length:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} is not a whole number of rows of {self.sequence_length} "
                f"tokens; use a multiple of {self.sequence_length}"
            )
        return self

    @property
    def rows_per_step(self) -> int:
        """Packed rows of a step."""
        return self.tokens_per_step // self.sequence_length


class ConvertStage(MixedStage):
    """Replace attention layers of the teacher by a mixer.

    Attributes:
        layers: the layers to replace; or else
        ranking: the rank stage whose least important ones to replace, and
        num_layers: how many of them.
    """

    kind: Literal["convert"] = "convert"
    layers: tuple[int, ...] | None = None
    ranking: str | None = None
    num_layers: int | None = Field(default=None, gt=0)
    seed: int = 0

    @field_validator("mixer")
    @classmethod
    def _not_attention(cls, value: AttentionSpec | Mamba1Spec) -> AttentionSpec | Mamba1Spec:
        if isinstance(value, AttentionSpec):
            raise ValueError("a layer is converted to a mixer other than attention; use mamba1")
        return value

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.layers is None) == (self.ranking is None):
            raise ValueError("give either layers, or ranking and num_layers")
        if (self.ranking is None) != (self.num_layers is None):
            raise ValueError("ranking and num_layers go together; give both or neither")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """The ranking, if one decides."""
        return (self.ranking,) if self.ranking else ()


class DistillStage(StageSpec):
    """Train a hybrid to follow the teacher's next-token distributions.

    Attributes:
        model: the stage that made the hybrid.
        loss: the paper's is reverse KL, KL(student || teacher).
        temperature: of both distributions.
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

    kind: Literal["distill"] = "distill"
    model: str
    loss: Divergence = "reverse_kl"
    temperature: float = Field(default=1.0, gt=0)
    steps: int = Field(gt=0)
    tokens_per_step: int = Field(default=64 * 16384, gt=0)
    sequence_length: int = Field(default=16384, gt=0)
    rows_per_batch: int = Field(default=1, gt=0)
    learning_rate: float = Field(default=5e-6, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    train: Literal["all", "mixers"] = "all"
    freeze: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    save_every: int = Field(default=100, gt=0)
    seed: int = 0

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
    def inputs(self) -> tuple[str, ...]:
        """The model to train."""
        return (self.model,)


class EvaluateStage(StageSpec):
    """Judge a model by what it generates on unseen problems.

    Attributes:
        model: a stage that made a model, or `teacher`.
        tasks: of the reasoning world.
        level: difficulty, 1..8.
        problems_per_task: unseen problems of each task.
        batch_size: problems answered at a time.
        label: how the report calls it; by default the model's name.
        control: whether it is a control, not the method.
    """

    kind: Literal["evaluate"] = "evaluate"
    model: str
    tasks: Annotated[tuple[str, ...], AfterValidator(check_tasks)] = TASK_NAMES
    level: int = Field(default=2, ge=1, le=MAX_LEVEL)
    problems_per_task: int = Field(default=250, gt=0)
    batch_size: int = Field(default=64, gt=0)
    label: str | None = None
    control: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The model to judge."""
        return () if self.model == TEACHER else (self.model,)


class ReportStage(StageSpec):
    """Write the report over all stages before it."""

    kind: Literal["report"] = "report"
    title: str | None = None


AnyStage = Annotated[RankStage | ConvertStage | DistillStage | EvaluateStage | ReportStage, Field(discriminator="kind")]

STAGE_KINDS: dict[str, type[StageSpec]] = {
    "rank": RankStage,
    "convert": ConvertStage,
    "distill": DistillStage,
    "evaluate": EvaluateStage,
    "report": ReportStage,
}

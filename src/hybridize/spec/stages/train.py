"""Training a hybrid: layer by layer, by distillation, on traces, on its own answers."""

from typing import Literal, Self

from pydantic import Field, model_validator

from hybridize.spec.base import Spec
from hybridize.spec.stages.base import Divergence, TrainStage


class StopSpec(Spec):
    """When to stop before the last step, by the divergence from the teacher on rows never trained on.

    Attributes:
        every: steps between two looks at it.
        heldout_rows: how many rows it is measured on.
        patience: stop after this many looks in a row that brought no improvement.
        min_delta: what counts as an improvement, nat per token.
        below: stop as soon as the loss is below this, nat per token.
    """

    every: int = Field(default=50, gt=0)
    heldout_rows: int = Field(default=8, gt=0)
    patience: int | None = Field(default=None, gt=0)
    min_delta: float = Field(default=0.0, ge=0)
    below: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _some_rule(self) -> Self:
        if self.patience is None and self.below is None:
            raise ValueError("give patience, or below, or both; else nothing ever stops")
        return self


class DistillStage(TrainStage):
    """Train a hybrid to follow the teacher's next-token distributions.

    Attributes:
        loss: the paper's is reverse KL, KL(student || teacher).
        temperature: of both distributions.
        stop: ends the stage early.
    """

    kind: Literal["distill"] = "distill"
    loss: Divergence = "reverse_kl"
    temperature: float = Field(default=1.0, gt=0)
    stop: StopSpec | None = None


class FitStage(TrainStage):
    """Fit each new mixer alone to the output of the attention it replaced; everything else stands still.

    Every mixer sees the hidden states that its layer has in the teacher, so all of them are fitted at once and none
    depends on another. The loss is the squared error over the mean square of the target: 0 is perfect, 1 is as good as
    silence. Only mixers are trained.
    """

    kind: Literal["fit"] = "fit"
    learning_rate: float = Field(default=1e-3, gt=0)
    train: Literal["mixers"] = "mixers"


class SftStage(TrainStage):
    """Fine-tune a model on traces, completion only.

    Attributes:
        model: a stage that made a hybrid, or `teacher`.
        teacher_control: do the same to the unconverted teacher, in a stage `<name>-teacher` beside this one.
    """

    kind: Literal["sft"] = "sft"
    teacher_control: bool = False

    @model_validator(mode="after")
    def _control_has_no_mixers(self) -> Self:
        if self.teacher_control and self.train == "mixers":
            raise ValueError("teacher_control: the teacher has no mixers to train; use train: all, or leave it out")
        return self


def control_name(stage: SftStage) -> str:
    """What the fine-tuned teacher beside a fine-tuned hybrid is called."""
    return f"{stage.name}-teacher"


class OnPolicyStage(TrainStage):
    """Distil on the student's own answers: it generates, the teacher scores, reverse KL on the student's tokens.

    Rows are not packed: a step takes `prompts_per_step` prompts. `tokens_per_step` and `sequence_length` are not used;
    use `max_new_tokens`.

    Attributes:
        prompts_per_step: answered in a step.
        rows_per_batch: of them computed at a time.
        max_new_tokens: of an answer.
        generation_temperature: of the student's sampling.
        loss: reverse KL by default.
    """

    kind: Literal["on_policy"] = "on_policy"
    loss: Divergence = "reverse_kl"
    temperature: float = Field(default=1.0, gt=0)
    prompts_per_step: int = Field(default=64, gt=0)
    max_new_tokens: int = Field(default=2048, gt=0)
    generation_temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _whole_rows(self) -> Self:
        if self.prompts_per_step % self.rows_per_batch:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} is not a whole number of batches of {self.rows_per_batch}; "
                "change rows_per_batch"
            )
        return self

"""Ranking attention layers."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from hybridize.spec.data import MAX_LEVEL, TASK_NAMES, check_tasks
from hybridize.spec.stages.base import TEACHER, DataStage, MixedStage

RankMethod = Literal["mmr", "loo", "kl", "window", "perplexity", "import", "uniform", "random"]


class RankStage(DataStage, MixedStage):
    """Rank a model's attention layers, least important first.

    Attributes:
        model: whose layers that are attention still; by default the teacher's. MMR and the others rank the current
            hybrid when a stage that made one is named.
        method: `mmr` swaps one layer at a time and trains it for a few steps (the paper's), `loo` leaves one layer out,
            `kl` restores one layer of an all-mixer student, `window` gives one layer a sliding window, `perplexity`
            swaps one layer and trains nothing, `import` reads published scores; `uniform` and `random` are controls.
        sweep: how `mmr` goes about it: `cheap` trains the swapped mixer only and runs no layer below it; `plain`
            trains all weights of a whole student for each layer, as the paper's text has it.
        identity: what `loo` leaves out: the `mixer` (the residual stream passes it by) or the whole `block`.
        score: what `loo` measures: the `loss` on held-out completions, or the accuracy in the reasoning `world`.
        window: tokens that a layer still sees under `window`.
        scores: the CSV file that `import` reads: a column `layer`, then one per task; row -1 is the baseline.
        steps: training steps per layer (`mmr`, `kl`; `kl` takes as many twice more, before it looks at layers). The
            paper: 100.
        tokens_per_step: tokens of a step.
        sequence_length: tokens of a packed row.
        heldout_rows: rows that the loss is measured on, before and after; never trained on.
        learning_rate: of what is trained, Adam. For `sweep: plain`, which trains all weights, take about a tenth.
        gradient_checkpointing: trade time for memory.
        tasks: of the reasoning world, for `score: world`.
        level: their difficulty.
        problems_per_task: how many of each.
    """

    kind: Literal["rank"] = "rank"
    model: str = TEACHER
    method: RankMethod = "mmr"
    sweep: Literal["cheap", "plain"] = "cheap"
    identity: Literal["mixer", "block"] = "mixer"
    score: Literal["loss", "world"] = "loss"
    window: int = Field(default=256, gt=0)
    scores: str | None = None
    steps: int = Field(default=100, gt=0)
    tokens_per_step: int = Field(default=16384, gt=0)
    sequence_length: int = Field(default=16384, gt=0)
    heldout_rows: int = Field(default=8, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    gradient_checkpointing: bool = False
    tasks: Annotated[tuple[str, ...], AfterValidator(check_tasks)] = TASK_NAMES
    level: int = Field(default=1, ge=1, le=MAX_LEVEL)
    problems_per_task: int = Field(default=32, gt=0)

    @model_validator(mode="after")
    def _whole_rows(self) -> Self:
        if self.tokens_per_step % self.sequence_length:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} is not a whole number of rows of {self.sequence_length} "
                f"tokens; use a multiple of {self.sequence_length}"
            )
        if (self.method == "import") != (self.scores is not None):
            raise ValueError("scores: method import reads a file of scores, no other method does; give both or neither")
        return self

    @property
    def rows_per_step(self) -> int:
        """Packed rows of a step."""
        return self.tokens_per_step // self.sequence_length

    @property
    def models(self) -> tuple[str, ...]:
        """The model whose layers are ranked."""
        return (self.model,)

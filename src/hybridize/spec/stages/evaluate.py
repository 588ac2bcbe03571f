"""Judging a model, and measuring its speed."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from hybridize.spec.base import choose
from hybridize.spec.data import MAX_LEVEL, TASK_NAMES, check_tasks
from hybridize.spec.stages.base import StageSpec


class JudgingStage(StageSpec):
    """A stage that looks at a model and changes nothing.

    Attributes:
        model: a stage that made a model, or `teacher`.
        label: how the report calls it; by default the model's name.
        control: whether it is a control, not the method.
    """

    model: str
    label: str | None = None
    control: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """The model to judge."""
        return (self.model,)


class EvaluateStage(JudgingStage):
    """Judge a model by what it generates on unseen problems of the reasoning world.

    Attributes:
        tasks: of the reasoning world.
        level: difficulty, 1..8.
        levels: difficulty by task, where it is not `level`. Tasks grow at different rates, so answers that are twice as
            long as those trained on come from other levels in each (`docs/world.md` has the lengths).
        problems_per_task: unseen problems of each task.
        batch_size: problems answered at a time.
        samples: answers to each problem; above 1, pass@k is reported for k = 1 and k = samples.
        temperature: of sampling; 0 is greedy, for one sample only.
        seed: of sampling.
    """

    kind: Literal["evaluate"] = "evaluate"
    tasks: Annotated[tuple[str, ...], AfterValidator(check_tasks)] = TASK_NAMES
    level: int = Field(default=2, ge=1, le=MAX_LEVEL)
    levels: dict[str, Annotated[int, Field(ge=1, le=MAX_LEVEL)]] = Field(default_factory=dict)
    problems_per_task: int = Field(default=250, gt=0)
    batch_size: int = Field(default=64, gt=0)
    samples: int = Field(default=1, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples: {self.samples} greedy answers are all the same; give a temperature, e.g. 0.6")
        return self

    @model_validator(mode="after")
    def _levels_of_its_tasks(self) -> Self:
        for task in self.levels:
            choose("levels", task, self.tasks)
        return self

    def level_of(self, task: str) -> int:
        """The difficulty of a task."""
        return self.levels.get(task, self.level)

    @property
    def difficulty(self) -> str:
        """In words: `level 2`, or `levels 5 (quantities), 4 (swaps)`."""
        levels = {task: self.level_of(task) for task in self.tasks}
        if len(set(levels.values())) == 1:
            return f"level {next(iter(levels.values()))}"
        return "levels " + ", ".join(f"{level} ({task})" for task, level in levels.items())


class HarnessStage(JudgingStage):
    """Judge a model with lm-evaluation-harness.

    Attributes:
        tasks: names of its tasks, or of the offline ones (`hybridize_gsm8k`, ...).
        limit: problems of each task; all by default.
        backend: what runs the model.
        batch_size: requests at a time.
        max_new_tokens: of each generated answer, thinking included; by default the task's own number, at most half of
            what the model reads.
        benchmarks: folder of the offline benchmarks' files.
    """

    kind: Literal["harness"] = "harness"
    tasks: tuple[str, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, gt=0)
    backend: Literal["hf", "vllm"] = "hf"
    batch_size: int = Field(default=8, gt=0)
    max_new_tokens: int | None = Field(default=None, gt=0)
    benchmarks: str | None = None


class TextStage(JudgingStage):
    """Perplexity of a model on plain text, and its divergence from the teacher there.

    Attributes:
        text: file of plain text (`.txt`) or of JSON lines with a key `text`, perhaps `.xz` or `.gz`; relative to the
            recipe.
        max_tokens: of the text.
        sequence_length: tokens of a window; windows do not overlap.
        batch_size: windows at a time.
    """

    kind: Literal["text"] = "text"
    text: str
    max_tokens: int = Field(default=100_000, gt=1)
    sequence_length: int = Field(default=2048, gt=1)
    batch_size: int = Field(default=4, gt=0)


class ThroughputStage(JudgingStage):
    """Measure how fast a model generates.

    Attributes:
        batch_size: sequences generated at a time.
        prompt_tokens: length of each prompt.
        new_tokens: generated for each.
        repeats: measurements; the median counts.
    """

    kind: Literal["throughput"] = "throughput"
    batch_size: int = Field(default=32, gt=0)
    prompt_tokens: int = Field(default=16, gt=0)
    new_tokens: int = Field(default=1024, gt=0)
    repeats: int = Field(default=3, gt=0)


class ReportStage(StageSpec):
    """Write the report over all stages before it."""

    kind: Literal["report"] = "report"
    title: str | None = None

"""Where training text comes from."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from hybridize.spec.base import Spec, choose

TASK_NAMES = ("quantities", "addition", "swaps", "recall")
"""Tasks of the built-in reasoning world."""

MAX_LEVEL = 8
"""Its hardest difficulty."""

WORLD_VERSION = 2
"""Raised whenever the world draws other problems than before, so that results from the old ones do not stand."""


def check_tasks(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of tasks as they are; raise a `ValueError` on one that does not exist, or on none."""
    if not tasks:
        raise ValueError(f"name at least one of {', '.join(TASK_NAMES)}")
    for position, task in enumerate(tasks):
        choose(f"tasks[{position}]", task, TASK_NAMES)
    return tasks


class WorldDataSpec(Spec):
    """Problems of the built-in reasoning world, from its training split.

    Attributes:
        tasks: names of tasks; all by default.
        levels: difficulties to draw from, 1..8, each as often as the others.
        seed: another draw of problems.
    """

    source: Literal["world"] = "world"
    tasks: Annotated[tuple[str, ...], AfterValidator(check_tasks)] = TASK_NAMES
    levels: tuple[int, ...] = (1, 2, 3)
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.levels:
            raise ValueError(f"levels must name at least one of 1..{MAX_LEVEL}")
        for level in self.levels:
            if not 1 <= level <= MAX_LEVEL:
                raise ValueError(f"levels: {level} is out of range; use 1..{MAX_LEVEL}")
        return self


class FileDataSpec(Spec):
    """Chats in a file, JSON lines or Parquet: rows of `messages`, or of `prompt` and `completion`.

    Prompts to be answered need no completion; `answer`, where there is one, is what a verifier compares with. A file
    whose name ends in `.txt` or `.md` is plain text: no chat, and every token is to be predicted.

    Attributes:
        path: of the file; relative to the recipe.
    """

    source: Literal["file"] = "file"
    path: str


class HubDataSpec(Spec):
    """A dataset that the `datasets` library loads: a name on the hub, or a folder that it understands.

    Attributes:
        dataset: name or folder.
        config: which of its configurations.
        split: which of its splits.
        columns: which columns hold `messages`, `prompt`, `completion` and `answer`, where they are called otherwise.
        revision: of the repository; without it, whatever is newest is read.
    """

    source: Literal["hub"] = "hub"
    dataset: str
    config: str | None = None
    split: str = "train"
    columns: dict[Literal["messages", "prompt", "completion", "answer"], str] = Field(default_factory=dict)
    revision: str | None = None


TRACES_FILE = "traces.parquet"
"""The file in a traces stage's folder that holds what it made."""


class TracesDataSpec(Spec):
    """What an earlier `traces` stage made.

    Attributes:
        stage: its name.
    """

    source: Literal["traces"] = "traces"
    stage: str


DataSpec = Annotated[WorldDataSpec | FileDataSpec | HubDataSpec | TracesDataSpec, Field(discriminator="source")]

"""Where training text comes from."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hybridize.spec.base import Spec


class WorldDataSpec(Spec):
    """Problems of the built-in reasoning world, from its training split.

    Attributes:
        tasks: names of tasks; all by default.
        levels: difficulties to draw from, 1..8, each as often as the others.
        seed: another draw of problems.
    """

    source: Literal["world"] = "world"
    tasks: tuple[str, ...] = ("quantities", "addition", "swaps", "recall")
    levels: tuple[int, ...] = (1, 2, 3)
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.levels or not self.tasks:
            raise ValueError("levels and tasks must each name at least one")
        for level in self.levels:
            if not 1 <= level <= 8:
                raise ValueError(f"levels: {level} is out of range; use 1..8")
        return self


class FileDataSpec(Spec):
    """Chats in a JSON-lines file, one a line: `{"messages": [...]}` or `{"prompt": ..., "completion": ...}`.

    Attributes:
        path: of the file; relative to the recipe.
    """

    source: Literal["file"] = "file"
    path: str


DataSpec = Annotated[WorldDataSpec | FileDataSpec, Field(discriminator="source")]

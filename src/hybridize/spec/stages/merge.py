"""Merging checkpoints."""

from typing import Literal, Self

from pydantic import Field, model_validator

from hybridize.spec.stages.base import StageSpec


class MergeStage(StageSpec):
    """Merge models of one layout into one.

    Attributes:
        sources: stages that made the models.
        method: `linear` is the weighted mean, `slerp` goes along the arc between two, `ties` (arXiv 2306.01708)
            trims and elects signs of the differences from `base`.
        weights: of each source; equal by default. For `slerp`, the second one's share is how far to go.
        base: the stage that made the model which all sources started from (`ties`).
        density: share of each difference that `ties` keeps.
    """

    kind: Literal["merge"] = "merge"
    sources: tuple[str, ...] = Field(min_length=2)
    method: Literal["linear", "slerp", "ties"] = "linear"
    weights: tuple[float, ...] | None = None
    base: str | None = None
    density: float = Field(default=0.2, gt=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.sources):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.sources)} sources; give one for each")
        if self.weights is not None and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError("weights: none may be negative, and one must be above 0")
        if self.method == "slerp" and len(self.sources) != 2:
            raise ValueError(f"sources: slerp takes two models, not {len(self.sources)}; use linear for more")
        if (self.method == "ties") != (self.base is not None):
            raise ValueError("base: ties needs the common starting point of its sources, no other method does")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """The sources, and the base if there is one."""
        return (*self.sources, *((self.base,) if self.base else ()))

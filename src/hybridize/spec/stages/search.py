"""Choosing a mixer for each layer."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from hybridize.spec.stages.base import StageSpec


class SearchStage(StageSpec):
    """Choose a mixer for each layer from rankings, one for each mixer, by predicted loss and cost.

    A layout's cost is what a decode step must move for a sequence, in bytes: keys and values, states read and written,
    and its share of the weights. With `gpu` it is the time a generated token is predicted to take in vLLM, its cache's
    groups included.

    Attributes:
        rankings: rank stages, each with another mixer, of the teacher, by `mmr` or by `perplexity`, alike in all else.
        speedup: how many times less than the teacher the layout must cost, at least.
        num_layers: how many layers are to be replaced, exactly.
        context_tokens: length of a sequence that bytes are reckoned for.
        concurrency: sequences that share the reading of the weights, likewise.
        gpu: what vLLM is predicted to run on: h200, h100, a100 or l40s.
        scenario: tokens that each sequence reads and writes there, e.g. `1k:8k`.
        max_groups: leave out layouts that vLLM's cache would be cut into more groups for.
    """

    kind: Literal["search"] = "search"
    rankings: tuple[str, ...] = Field(min_length=1)
    speedup: float | None = Field(default=None, gt=0)
    num_layers: int | None = Field(default=None, gt=0)
    context_tokens: int = Field(default=8192, gt=0)
    concurrency: int = Field(default=64, gt=0)
    gpu: str | None = None
    scenario: str = "1k:8k"
    max_groups: int | None = Field(default=None, gt=0)

    @field_validator("rankings")
    @classmethod
    def _named_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = [name for name in value if value.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is named twice; name each ranking once")
        return value

    @model_validator(mode="after")
    def _some_target(self) -> Self:
        if self.speedup is None and self.num_layers is None:
            raise ValueError("give speedup, or num_layers, or both; else nothing need be replaced")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """The rankings."""
        return self.rankings

"""What a scorer is given, and what it answers; imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.spec.stages import RankStage

Batch = Mapping[str, Any]
"""Packed rows as tensors, see `hybridize.importance.rank_layers`."""

Judge = Callable[[Any], float]
"""Takes a model that generates, and says which share of some problems it solves, 0..1."""

OnProgress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class Request:
    """What a scorer works on: the arguments of `rank_layers`, and the layers to rank.

    Attributes:
        layers: the layers that are attention still, ascending.
        checkpoint: trade time for memory.
    """

    model: Any
    teacher: Any
    batches: Sequence[Batch]
    heldout: Sequence[Batch]
    stage: RankStage
    state_dir: Path
    layers: tuple[int, ...]
    on_progress: OnProgress | None = None
    checkpoint: bool = False
    judge: Judge | None = None


@dataclass(frozen=True)
class Scores:
    """What a scorer found.

    Attributes:
        order: layers, least important first; None: evenly spaced ones.
        scores: by layer; None for a control.
        before: by layer, before any training; None where nothing is trained.
        baseline: the same measure of the model to compare with; None where there is none.
        unit: of the scores, where it is not the method's usual one.
        tokens: trained on, all layers together.
        tokens_scored: that a loss was measured on, likewise.
        seconds: taken, earlier runs' finished layers included.
    """

    order: tuple[int, ...] | None
    scores: Mapping[int, float] | None = None
    before: Mapping[int, float] | None = None
    baseline: float | None = None
    unit: str | None = None
    tokens: int = 0
    tokens_scored: int = 0
    seconds: float = 0.0

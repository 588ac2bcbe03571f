"""The one table of scorers, and the door to all of them. A new scorer is a row."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from hybridize.importance.ranking import NAT_PER_TOKEN, LayerOrder, Ranking, order_by_score
from hybridize.spec import AttentionGeometry, AttentionSpec
from hybridize.spec.stages import RankStage

Batch = Mapping[str, Any]
"""Packed rows as tensors, see `rank_layers`."""


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
    on_progress: Callable[[int, int], None] | None = None
    checkpoint: bool = False


@dataclass(frozen=True)
class Scores:
    """What a scorer found.

    Attributes:
        order: layers, least important first; None: evenly spaced ones.
        scores: by layer; None for a control.
        before: by layer, before any training; None for a control.
        tokens: trained on, all layers together.
        seconds: taken, earlier runs' finished layers included.
    """

    order: tuple[int, ...] | None
    scores: Mapping[int, float] | None = None
    before: Mapping[int, float] | None = None
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Method:
    """One row: a scorer.

    Attributes:
        function: scores the layers of a request.
        unit: of the scores; empty for a control.
        paper: where it comes from.
        is_control: whether it looks at no model and is there to be beaten.
    """

    function: Callable[[Request], Scores]
    unit: str
    paper: str
    is_control: bool


def score_by_mmr(request: Request) -> Scores:
    """Swap one layer at a time for a mixer, train it for a few steps, and take the loss at the end."""
    from hybridize.importance.mmr import score_layers

    started = time.perf_counter()
    results, spent_before = score_layers(request)
    scores = {layer: result.after_nats for layer, result in results.items()}
    return Scores(
        order=order_by_score(scores),
        scores=scores,
        before={layer: result.before_nats for layer, result in results.items()},
        tokens=sum(result.num_tokens for result in results.values()),
        seconds=time.perf_counter() - started + spent_before,
    )


def score_uniformly(request: Request) -> Scores:
    """Evenly spaced layers, for whatever number is asked for."""
    return Scores(order=None)


def score_at_random(request: Request) -> Scores:
    """A permutation that depends on the stage's seed and the layers only."""
    order = list(request.layers)
    Random(f"layer order/{request.stage.seed}").shuffle(order)
    return Scores(order=tuple(order))


METHODS: dict[str, Method] = {
    "mmr": Method(score_by_mmr, NAT_PER_TOKEN, "arXiv 2511.02651", is_control=False),
    "uniform": Method(score_uniformly, "", "every k-th layer", is_control=True),
    "random": Method(score_at_random, "", "a seeded permutation", is_control=True),
}


def rank_layers(
    model: Any,
    teacher: Any,
    batches: Sequence[Batch],
    heldout: Sequence[Batch],
    stage: RankStage,
    *,
    state_dir: Path,
    on_progress: Callable[[int, int], None] | None = None,
    checkpoint: bool = False,
) -> Ranking:
    """Rank the layers of a model that are attention still.

    Args:
        model: the teacher itself, or a hybrid of it; left as it is.
        teacher: what a swapped layer is distilled from; frozen, left as it is.
        batches: for `mmr`, the rows of each of the stage's steps: what `PackedRows.collate` gives, namely
            `input_ids`, `position_ids` (from 0 for each packed document) and `valid` (whether the next token
            is to be predicted), each [rows, length]. Every layer is trained on the same ones.
        heldout: likewise, of documents that are not in `batches`; the loss is measured on them.
        stage: method and settings.
        state_dir: folder in which finished layers are kept, so that a killed run goes on after them.
        on_progress: called with (steps done, steps in all), all layers together.
        checkpoint: compute the layers above the swapped one a second time in backward instead of keeping
            their activations.

    Returns:
        The ranking, with both controls.

    Raises:
        ValueError: no layer is attention, the mixer is attention, the batches do not fit the stage, or a
            layer's loss is not finite.
    """
    from hybridize.models import geometry_of, layout_of

    if isinstance(stage.mixer, AttentionSpec):
        raise ValueError("mixer: ranking swaps attention for another mixer, not for attention; use mamba1")
    layout = layout_of(model.config)
    layers = tuple(i for i, mixer in enumerate(layout.layers) if isinstance(mixer, AttentionSpec))
    if not layers:
        raise ValueError(f"model: no layer of its layout {layout} is attention; there is nothing to rank")
    geometry: AttentionGeometry = geometry_of(model.config)
    stage = stage.model_copy(update={"mixer": stage.mixer.resolve(geometry)})
    request = Request(model, teacher, batches, heldout, stage, Path(state_dir), layers, on_progress, checkpoint)
    method = METHODS[stage.method]
    found = method.function(request)
    return Ranking(
        method=stage.method,
        layers=layers,
        order=found.order,
        num_layers=len(layout.layers),
        mixer=stage.mixer,
        unit=method.unit,
        scores=found.scores,
        before=found.before,
        settings=stage.model_dump(mode="json", exclude={"name", "kind", "mixer", "method"}),
        cost={"tokens": found.tokens, "seconds": found.seconds},
        controls={
            name: LayerOrder(name, layers, row.function(request).order)
            for name, row in METHODS.items()
            if row.is_control
        },
    )


def rank_cost(num_layers: int, stage: RankStage, layers: Sequence[int] | None = None) -> dict[str, int]:
    """What a ranking will cost, before it starts.

    Args:
        num_layers: of the model.
        stage: method and settings.
        layers: those to rank; by default all.

    Returns:
        `tokens_per_layer` and `tokens` trained on; `layer_passes`: forward passes of one decoder layer over
        the tokens of one step; `layer_passes_saved`: how many more it would take to run the whole student and
        the whole teacher for each layer ranked. Backward passes are the same either way, at most as many as
        the swapped layers and those above them.
    """
    ranked = sorted(range(num_layers) if layers is None else layers)
    if METHODS[stage.method].is_control or not ranked:
        return dict.fromkeys(("tokens_per_layer", "tokens", "layer_passes", "layer_passes_saved"), 0)
    plain = 2 * num_layers * len(ranked)
    # The teacher once; the layers up to the highest one ranked once; from each swapped layer upwards.
    cheap = num_layers + ranked[-1] + sum(num_layers - layer for layer in ranked)
    tokens_per_layer = stage.steps * stage.tokens_per_step
    return {
        "tokens_per_layer": tokens_per_layer,
        "tokens": tokens_per_layer * len(ranked),
        "layer_passes": cheap * stage.steps,
        "layer_passes_saved": (plain - cheap) * stage.steps,
    }

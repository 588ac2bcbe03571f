"""The one table of scorers, and the door to all of them. A new scorer is a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from hybridize.importance.cost import rank_cost
from hybridize.importance.published import score_by_import
from hybridize.importance.ranking import ACCURACY_LOST, NAT_PER_TOKEN, LayerOrder, Ranking
from hybridize.importance.request import Batch, Judge, OnProgress, Request, Scores
from hybridize.spec import AttentionGeometry, AttentionSpec
from hybridize.spec.mixers import CarriesAttention
from hybridize.spec.stages import RankStage


@dataclass(frozen=True)
class Method:
    """One row: a scorer.

    Attributes:
        function: scores the layers of a request.
        unit: of the scores, unless a setting asks for another; empty for a control.
        paper: where it comes from.
        is_control: whether it looks at no model and is there to be beaten.
    """

    function: Callable[[Request], Scores]
    unit: str
    paper: str
    is_control: bool = False


def score_uniformly(request: Request) -> Scores:
    """Evenly spaced layers, for whatever number is asked for."""
    return Scores(order=None)


def score_at_random(request: Request) -> Scores:
    """A permutation that depends on the stage's seed and the layers only."""
    order = list(request.layers)
    Random(f"layer order/{request.stage.seed}").shuffle(order)
    return Scores(order=tuple(order))


def _at_first_use(module: str, name: str) -> Callable[[Request], Scores]:
    """A scorer whose module, which imports torch, is imported when it is called."""

    def score(request: Request) -> Scores:
        from importlib import import_module

        found: Scores = getattr(import_module(f"hybridize.importance.{module}"), name)(request)
        return found

    return score


METHODS: dict[str, Method] = {
    "mmr": Method(_at_first_use("mmr", "score_by_mmr"), NAT_PER_TOKEN, "arXiv 2511.02651"),
    "loo": Method(_at_first_use("untrained", "score_by_loo"), NAT_PER_TOKEN, "arXiv 2511.02651"),
    "kl": Method(_at_first_use("kl", "score_by_kl"), NAT_PER_TOKEN, "arXiv 2512.20569"),
    "window": Method(_at_first_use("untrained", "score_by_window"), NAT_PER_TOKEN, "a window for one layer"),
    "perplexity": Method(_at_first_use("untrained", "score_by_perplexity"), NAT_PER_TOKEN, "a mixer for one layer"),
    "import": Method(score_by_import, ACCURACY_LOST, "scores from a file"),
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
    on_progress: OnProgress | None = None,
    checkpoint: bool = False,
    judge: Judge | None = None,
) -> Ranking:
    """Rank the layers of a model that are attention still.

    Args:
        model: the teacher itself, or a hybrid of it; left as it is.
        teacher: what students are distilled from; frozen, left as it is.
        batches: for `mmr` and `kl`, the rows of each of the stage's steps: what `PackedRows.collate` gives, namely
            `input_ids`, `position_ids` (from 0 for each packed document) and `valid` (whether the next token
            is to be predicted), each [rows, length]. Every layer is trained on the same ones.
        heldout: likewise, of documents that are not in `batches`; the loss is measured on them. Not needed by
            `import`, the controls, and `loo` judged in the world.
        stage: method and settings.
        state_dir: folder in which finished layers are kept, so that a killed run goes on after them.
        on_progress: called with (steps done, steps in all), all layers together; a layer for which nothing is trained
            counts as one step.
        checkpoint: compute the layers above the lowest one trained a second time in backward instead of keeping
            their activations.
        judge: for `loo` with score `world`: takes a model with `generate` and gives its accuracy, 0..1.

    Returns:
        The ranking, with both controls.

    Raises:
        ValueError: no layer is attention, the mixer is attention or has nothing to train, the batches do not fit the
            stage, or a judge or the file of scores is missing or unsound.
        StoppedError: a layer's loss is not finite.
    """
    from hybridize.models import geometry_of, layout_of

    if isinstance(stage.mixer, AttentionSpec):
        raise ValueError("mixer: ranking swaps attention for another mixer, not for attention; use mamba1")
    if stage.method in ("mmr", "kl") and not isinstance(stage.mixer, CarriesAttention):
        raise ValueError(
            f"mixer: {stage.method} trains what it swaps in, and {stage.mixer.type} has nothing new to train; use a "
            "mixer with a state, or method window or loo"
        )
    layout = layout_of(model.config)
    layers = tuple(i for i, mixer in enumerate(layout.layers) if isinstance(mixer, AttentionSpec))
    if not layers:
        raise ValueError(f"model: no layer of its layout {layout} is attention; there is nothing to rank")
    geometry: AttentionGeometry = geometry_of(model.config)
    stage = stage.model_copy(update={"mixer": stage.mixer.resolve(geometry)})
    request = Request(model, teacher, batches, heldout, stage, Path(state_dir), layers, on_progress, checkpoint, judge)
    method = METHODS[stage.method]
    found = method.function(request)
    measured = {"tokens": found.tokens, "tokens_scored": found.tokens_scored, "seconds": found.seconds}
    return Ranking(
        method=stage.method,
        layers=layers,
        order=found.order,
        num_layers=len(layout.layers),
        mixer=stage.mixer,
        unit=found.unit or method.unit,
        scores=found.scores,
        before=found.before,
        baseline=found.baseline,
        settings=stage.model_dump(mode="json", exclude={"name", "kind", "mixer", "method"}),
        cost=rank_cost(len(layout.layers), stage, layers) | measured,
        controls={
            name: LayerOrder(name, layers, row.function(request).order)
            for name, row in METHODS.items()
            if row.is_control
        },
    )

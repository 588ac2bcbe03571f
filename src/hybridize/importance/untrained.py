"""Scorers that train nothing: change one layer, and see how much worse the model becomes.

- `loo` leaves the layer out: its attention, or the whole of it.
- `perplexity` swaps its attention for a mixer as initialised from it.
- `window` lets it see the last few tokens only.

The measure is the cross-entropy of the held-out completions, or, for `loo`, what a judge says of the answers that the
model writes. Losses are measured by the cheap sweep of `Rows`: no layer below the changed one runs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch

from hybridize.importance.changes import left_out, windowed
from hybridize.importance.ranking import ACCURACY_LOST
from hybridize.importance.request import Request, Scores
from hybridize.importance.rows import check_heldout, make_rows, shared_copy
from hybridize.importance.steps import measure
from hybridize.importance.trials import BASELINE, OnStep, Trial, Try, as_scores, check_finite, run_trials
from hybridize.models import swap_layer
from hybridize.transfer import replace_layer

Change = Callable[[Any, int], AbstractContextManager[None]]
"""Changes one layer of a model, for a while."""


def score_by_loo(request: Request) -> Scores:
    """Leave one layer out at a time.

    With `score: loss` a layer's importance is the loss without it, and the baseline the loss of the whole model. With
    `score: world` it is what the judge's accuracy loses, the whole model's minus that without the layer, and the
    baseline is the whole model's.

    Raises:
        ValueError: there is no judge or nothing to measure a loss on.
        StoppedError: a measure is not finite.
    """
    stage = request.stage

    def change(model: Any, layer: int) -> AbstractContextManager[None]:
        return left_out(model, layer, stage.identity)

    return _judge_each(request, change) if stage.score == "world" else _measure_each(request, change)


def score_by_window(request: Request) -> Scores:
    """Give one layer at a time a causal window of `stage.window` tokens; importance is the loss with it.

    Raises:
        ValueError: the model's attention takes no mask, or there is nothing to measure on.
        StoppedError: a loss is not finite.
    """
    return _measure_each(request, lambda model, layer: windowed(model, layer, request.stage.window))


def score_by_perplexity(request: Request) -> Scores:
    """Swap one layer at a time for its mixer as initialised; importance is the loss with it, in nat per token.

    Raises:
        ValueError: there is nothing to measure on.
        StoppedError: a loss is not finite.
    """
    stage = request.stage

    @contextmanager
    def change(model: Any, layer: int) -> Iterator[None]:
        old = replace_layer(model, layer, stage.mixer, stage.init, stage.seed)
        try:
            yield
        finally:
            swap_layer(model, layer, old)

    return _measure_each(request, change)


def _measure_each(request: Request, change: Change) -> Scores:
    check_heldout(request.heldout)

    def prepare(_: OnStep) -> Try:
        model = shared_copy(request.model)
        heldout = make_rows(request.heldout, model.device)
        num_tokens = sum(rows.num_tokens for rows in heldout)

        def loss(layer: int) -> float:
            return measure(heldout, lambda rows: rows.cross_entropy(model), request.stage, layer)

        def try_layer(layer: int, on_step: OnStep) -> Trial:
            if layer == BASELINE:
                score = loss(layer)
            else:
                for rows in heldout:
                    rows.advance(model, layer)
                with change(model, layer), torch.no_grad():
                    score = loss(layer)
            on_step(1)
            return Trial(score, tokens_scored=num_tokens)

        return try_layer

    trials, seconds = run_trials(request, prepare, baseline=True)
    return as_scores(trials, seconds)


def _judge_each(request: Request, change: Change) -> Scores:
    judge = request.judge
    if judge is None:
        raise ValueError("judge: score 'world' needs a function that judges what a model writes; give one")

    def prepare(_: OnStep) -> Try:
        model = shared_copy(request.model)

        def accuracy(layer: int) -> float:
            return check_finite(float(judge(model)), layer, "the judge says {}", "it must say which share is right")

        def try_layer(layer: int, on_step: OnStep) -> Trial:
            if layer == BASELINE:
                score = accuracy(layer)
            else:
                with change(model, layer):
                    score = accuracy(layer)
            on_step(1)
            return Trial(score)

        return try_layer

    trials, seconds = run_trials(request, prepare, baseline=True)
    whole = trials[BASELINE].score
    lost = {layer: whole - trials[layer].score for layer in request.layers}
    return replace(as_scores(trials, seconds, lost), unit=ACCURACY_LOST)

"""MIL-Mamba replacement (arXiv 2511.02651): how well a briefly trained mixer stands in for attention.

For each attention layer: swap it for a mixer that starts from its weights, train for a few steps to follow the frozen
teacher (reverse KL over the completions), and measure the loss on held-out rows. The lower it ends, the less the
layer's attention matters.

The paper's text does not say what is trained. The sweep `plain` reads it literally: for each layer a whole student of
its own, all its weights trained, student and teacher run from bottom to top at every step. The sweep `cheap` trains
the new mixer alone, runs no layer below it (see `Rows`), and the teacher once for all layers.
"""

from collections.abc import Callable
from typing import Any

import torch

from hybridize.importance.request import Request, Scores
from hybridize.importance.rows import Rows, check_heldout, make_rows, shared_copy
from hybridize.importance.steps import autocast, check_batches, measure, train
from hybridize.importance.trials import OnStep, Trial, Try, as_scores, run_trials
from hybridize.models import MixerLayer, attention_module, layout_of, swap_layer
from hybridize.transfer import convert, replace_layer


def score_by_mmr(request: Request) -> Scores:
    """Swap one layer at a time for a mixer, train it for a few steps, and take the loss at the end.

    Raises:
        ValueError: the batches do not fit the stage.
        StoppedError: a loss is not finite.
    """
    check_batches(request.batches, request.stage)
    check_heldout(request.heldout)
    prepare: Callable[[OnStep], Try] = _prepare_plain(request) if request.stage.sweep == "plain" else _prepare(request)
    trials, seconds = run_trials(request, prepare, steps=request.stage.steps)
    return as_scores(trials, seconds)


def _prepare(request: Request) -> Callable[[OnStep], Try]:
    def prepare(_: OnStep) -> Try:
        student, teacher = shared_copy(request.model), request.teacher
        batches, heldout = make_rows(request.batches, student.device), make_rows(request.heldout, student.device)
        for rows in (*batches, *heldout):
            rows.see_teacher(teacher)

        def try_layer(layer: int, on_step: OnStep) -> Trial:
            for rows in (*batches, *heldout):
                rows.advance(student, layer)
            return _try_layer(request, student, layer, batches, heldout, on_step)

        return try_layer

    return prepare


def _try_layer(
    request: Request, student: Any, layer: int, batches: list[Rows], heldout: list[Rows], on_step: OnStep
) -> Trial:
    """Swap a layer, train its mixer, measure, and put the attention back."""
    stage, teacher = request.stage, request.teacher
    old = replace_layer(student, layer, stage.mixer, stage.init, stage.seed)
    try:
        mixer = attention_module(student, layer)
        assert isinstance(mixer, MixerLayer)
        parameters = list(mixer.cast(torch.float32).requires_grad_(True).parameters())
        with autocast(student):
            before = measure(heldout, lambda rows: rows.divergence(student, teacher), stage, layer)
            train(
                parameters,
                batches,
                lambda rows: rows.divergence(student, teacher, checkpoint=request.checkpoint),
                stage,
                layer,
                on_step,
            )
            after = measure(heldout, lambda rows: rows.divergence(student, teacher), stage, layer)
    finally:
        swap_layer(student, layer, old)
    return _trial(before, after, batches, heldout)


def _prepare_plain(request: Request) -> Callable[[OnStep], Try]:
    def prepare(_: OnStep) -> Try:
        device = request.model.device
        batches, heldout = make_rows(request.batches, device), make_rows(request.heldout, device)

        def try_layer(layer: int, on_step: OnStep) -> Trial:
            return _try_plainly(request, layer, batches, heldout, on_step)

        return try_layer

    return prepare


def _try_plainly(request: Request, layer: int, batches: list[Rows], heldout: list[Rows], on_step: OnStep) -> Trial:
    """Convert one layer of a model's copy, train all of the copy, and measure; nothing is kept between steps."""
    stage, teacher = request.stage, request.teacher
    layout = layout_of(request.model.config).with_replaced([layer], stage.mixer)
    student, _ = convert(request.model, layout, stage.init, stage.seed)
    student = student.requires_grad_(True).eval()
    for parameter in student.parameters():
        parameter.data = parameter.data.float()

    def loss_of(rows: Rows) -> Any:
        rows.see_teacher(teacher)
        try:
            return rows.divergence(student, teacher, checkpoint=request.checkpoint and torch.is_grad_enabled())
        finally:
            rows.teacher_hidden_NF = None

    with autocast(request.model):
        before = measure(heldout, loss_of, stage, layer)
        train(list(student.parameters()), batches, loss_of, stage, layer, on_step)
        after = measure(heldout, loss_of, stage, layer)
    return _trial(before, after, batches, heldout)


def _trial(before: float, after: float, batches: list[Rows], heldout: list[Rows]) -> Trial:
    return Trial(
        score=after,
        before=before,
        tokens=sum(rows.num_tokens for rows in batches),
        tokens_scored=2 * sum(rows.num_tokens for rows in heldout),
    )

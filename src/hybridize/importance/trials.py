"""One trial per layer, from the bottom up; a finished one is a file, so that a killed run goes on after it."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.importance.ranking import order_by_score, write_json
from hybridize.importance.request import Request, Scores
from hybridize.spec.base import StoppedError

STATE_FORMAT = "hybridize.ranking-layer/2"

OnStep = Callable[[int], None]
"""Called with the steps of a trial that are done."""


@dataclass(frozen=True)
class Trial:
    """One layer's trial.

    Attributes:
        score: what was measured at its end.
        before: the same before training; None where nothing is trained.
        tokens: trained on, prompts included.
        tokens_scored: that a loss was measured on.
        seconds: taken.
    """

    score: float
    before: float | None = None
    tokens: int = 0
    tokens_scored: int = 0
    seconds: float = 0.0


BASELINE = -1
"""Stands for the trial in which no layer is changed."""

Try = Callable[[int, OnStep], Trial]
"""Tries a layer, or the `BASELINE`; its seconds are filled in by the caller."""


def run_trials(
    request: Request,
    prepare: Callable[[OnStep], Try],
    *,
    baseline: bool = False,
    steps: int = 1,
    steps_ahead: int = 0,
) -> tuple[dict[int, Trial], float]:
    """Try every layer of a request, those that an earlier run has finished excepted.

    Args:
        request: what to try; its `on_progress` hears of every step.
        prepare: called once if there is anything to try, before it; gives what tries a layer.
        baseline: whether to try the `BASELINE` too, before all layers.
        steps: of each trial.
        steps_ahead: of `prepare`.

    Returns:
        The trials by layer, and the seconds they took, those of earlier runs and of `prepare` included.
    """
    started = time.perf_counter()
    places = ((BASELINE,) if baseline else ()) + request.layers
    key = identity(request)
    files = {place: _state_file(request.state_dir, place) for place in places}
    found = {place: _read(file, key, place) for place, file in files.items()}
    trials = {place: trial for place, trial in found.items() if trial is not None}
    seconds_before = sum(trial.seconds for trial in trials.values())
    total = steps_ahead + len(places) * steps

    def tell(done: int) -> None:
        if request.on_progress:
            request.on_progress(done, total)

    if len(trials) == len(places):
        tell(total)
        return trials, seconds_before
    done = len(trials) * steps
    tell(done)
    was_training = request.teacher.training
    request.teacher.eval()
    try:
        try_layer = prepare(lambda step: tell(done + step))
        done += steps_ahead
        for place in places:
            if place in trials:
                continue
            begun, before = time.perf_counter(), done
            trial = try_layer(place, lambda step, before=before: tell(before + step))  # type: ignore[misc]
            trial = Trial(**{**asdict(trial), "seconds": time.perf_counter() - begun})
            write_json(files[place], {"format": STATE_FORMAT, "key": key, "layer": place, **asdict(trial)})
            trials[place] = trial
            done += steps
    finally:
        request.teacher.train(was_training)
    return {place: trials[place] for place in places}, seconds_before + time.perf_counter() - started


def as_scores(trials: Mapping[int, Trial], seconds: float, scores: Mapping[int, float] | None = None) -> Scores:
    """Trials as a scorer's answer.

    Args:
        trials: by layer, perhaps with the `BASELINE`.
        seconds: taken.
        scores: by layer, where the trials' own are not the importance.
    """
    layers = {layer: trial for layer, trial in trials.items() if layer != BASELINE}
    chosen = {layer: trial.score for layer, trial in layers.items()} if scores is None else dict(scores)
    before = {layer: trial.before for layer, trial in layers.items() if trial.before is not None}
    return Scores(
        order=order_by_score(chosen),
        scores=chosen,
        before=before or None,
        baseline=trials[BASELINE].score if BASELINE in trials else None,
        tokens=sum(trial.tokens for trial in trials.values()),
        tokens_scored=sum(trial.tokens_scored for trial in trials.values()),
        seconds=seconds,
    )


def name_of(layer: int) -> str:
    """A trial's name in messages and files."""
    return "baseline" if layer == BASELINE else f"layer {layer}"


def check_finite(value: float, layer: int, when: str, remedy: str) -> float:
    """Give the value back.

    Raises:
        StoppedError: it is not finite; names the layer and the remedy.
    """
    if not math.isfinite(value):
        raise StoppedError(f"{name_of(layer)}: {when.format(value)}; {remedy}. The layers ranked so far are kept")
    return value


def identity(request: Request) -> str:
    """A hash of all that a trial's result depends on: settings, rows, and a sample of each model tensor."""
    digest = hashlib.sha256()
    settings = request.stage.model_dump(mode="json", exclude={"name", "kind"})
    digest.update(json.dumps([STATE_FORMAT, settings, request.layers], sort_keys=True).encode())
    for batch in (*request.batches, *request.heldout):
        for name in ("input_ids", "position_ids", "valid"):
            _add(digest, name, batch[name])
    digest.update(f"held out: {len(request.heldout)}".encode())
    models = [request.model] if request.model is request.teacher else [request.model, request.teacher]
    for model in models:
        for name, tensor in model.state_dict().items():
            stride = max(1, tensor.numel() // 256)
            _add(digest, name, tensor.flatten()[::stride], tensor.shape)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor, shape: Sequence[int] | None = None) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape if shape is None else shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _state_file(state_dir: Path, layer: int) -> Path:
    return state_dir / f"{name_of(layer).replace(' ', '-')}.json"


def _read(file: Path, key: str, layer: int) -> Trial | None:
    """A finished trial; None if there is none, or it is of other settings, data or models."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if (state["format"], state["key"], state["layer"]) != (STATE_FORMAT, key, layer):
            return None
        return Trial(**{name: state[name] for name in Trial.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None

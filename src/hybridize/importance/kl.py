"""KL-guided selection (arXiv 2512.20569): how much nearer to the teacher one layer of attention brings a student.

The paper starts from a student all of whose layers are mixers, each aligned with the output of the attention that it
replaces (its stage 1). For each layer it restores that layer's attention alone, distils the student, and ranks layers
by how far the divergence from the teacher falls below that of the all-mixer student distilled alike. What is done here:

1. All layers to be ranked become mixers. While the model runs with its own attention, each mixer is trained for
   `steps` steps to give what its layer's attention gives on the same input; the loss is the squared error over the
   target's mean square.
2. The aligned student is distilled for `steps` steps and its divergence measured on held-out rows: the baseline.
3. For each layer: from the aligned student again, its attention restored, the same steps, the same rows. Importance is
   the baseline minus the divergence now, in nat per token; it can be negative.

What differs from the paper: reverse KL, as in all distillation here, where the authors' code minimises the forward
one; only the mixers are trained, not the whole student; the divergence is that on held-out rows, not the training
loss; and the steps are few, where the paper spends 100M tokens on alignment and up to 600M on each layer. On a hybrid,
the layers that are mixers already stay frozen as they are, and attention restored is the hybrid's own.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hybridize.files import write_whole
from hybridize.importance.decoder import run_layers
from hybridize.importance.request import Request, Scores
from hybridize.importance.rows import Rows, check_heldout, make_rows, shared_copy
from hybridize.importance.steps import autocast, check_batches, check_loss, make_optimizer, measure, take_step, train
from hybridize.importance.trials import BASELINE, OnStep, Trial, Try, as_scores, identity, run_trials
from hybridize.models import MixerLayer, attention_module, swap_layer
from hybridize.models.hybrid import document_starts
from hybridize.spec.stages import RankStage
from hybridize.transfer import replace_layer

ALIGNED_FILE = "aligned.safetensors"


def score_by_kl(request: Request) -> Scores:
    """Restore one layer's attention at a time in an all-mixer student, distil it, and take what the KL loses.

    Raises:
        ValueError: the batches do not fit the stage.
        StoppedError: a loss is not finite.
    """
    stage = request.stage
    check_batches(request.batches, stage)
    check_heldout(request.heldout)

    def prepare(on_step: OnStep) -> Try:
        return _Trials(request, on_step).try_layer

    trials, seconds = run_trials(request, prepare, baseline=True, steps=stage.steps, steps_ahead=stage.steps)
    whole = trials[BASELINE].score
    return as_scores(trials, seconds, {layer: whole - trials[layer].score for layer in request.layers})


class _Trials:
    """The aligned all-mixer student, and what is tried with it."""

    def __init__(self, request: Request, on_step: OnStep) -> None:
        self.request = request
        source, self.student = shared_copy(request.model), shared_copy(request.model)
        stage, first = request.stage, request.layers[0]
        self.attention: dict[int, nn.Module] = {}
        self.mixers: dict[int, MixerLayer] = {}
        for layer in request.layers:
            self.attention[layer] = replace_layer(self.student, layer, stage.mixer, stage.init, stage.seed)
            mixer = attention_module(self.student, layer)
            assert isinstance(mixer, MixerLayer)
            self.mixers[layer] = mixer.cast(torch.float32).requires_grad_(True)
        device = self.student.device
        self.batches, self.heldout = make_rows(request.batches, device), make_rows(request.heldout, device)
        file, key = request.state_dir / ALIGNED_FILE, identity(request)
        if _load(file, key, self.mixers):
            on_step(stage.steps)
        else:
            with autocast(source):
                align(source, self.mixers, self.batches, stage, on_step)
            _save(file, key, self.mixers)
        self.aligned = {
            layer: {name: tensor.detach().cpu().clone() for name, tensor in mixer.state_dict().items()}
            for layer, mixer in self.mixers.items()
        }
        for rows in (*self.batches, *self.heldout):
            rows.see_teacher(request.teacher)
            rows.advance(self.student, first)  # layers below the first mixer never change

    def try_layer(self, layer: int, on_step: OnStep) -> Trial:
        """Distil the aligned student with one layer's attention restored, or with none, and measure."""
        request, student, teacher = self.request, self.student, self.request.teacher
        for place, mixer in self.mixers.items():
            mixer.load_state_dict(self.aligned[place])
        if layer != BASELINE:
            swap_layer(student, layer, self.attention[layer])
        parameters = [
            parameter for place, mixer in self.mixers.items() if place != layer for parameter in mixer.parameters()
        ]

        def loss_of(rows: Rows) -> Tensor:
            return rows.divergence(student, teacher, checkpoint=request.checkpoint and torch.is_grad_enabled())

        try:
            with autocast(request.model):
                train(parameters, self.batches, loss_of, request.stage, layer, on_step)
                score = measure(self.heldout, loss_of, request.stage, layer)
        finally:
            if layer != BASELINE:
                swap_layer(student, layer, self.mixers[layer])
        first = 2 if layer == BASELINE else 1  # the alignment's steps are the baseline's as well
        return Trial(
            score=score,
            tokens=first * sum(rows.num_tokens for rows in self.batches),
            tokens_scored=sum(rows.num_tokens for rows in self.heldout),
        )


def align(
    source: Any, mixers: dict[int, MixerLayer], batches: Sequence[Rows], stage: RankStage, on_step: OnStep
) -> None:
    """Train mixers, a step per batch, each to give what its layer's attention gives on the same input.

    Args:
        source: the model with its attention, frozen.
        mixers: by layer; trained in place.
        batches: rows at layer 0.
        stage: the learning rate.
        on_step: called after each step.

    Raises:
        StoppedError: an error is not finite.
    """
    groups = [list(mixer.parameters()) for mixer in mixers.values()]
    optimizer = make_optimizer([parameter for group in groups for parameter in group], stage)
    for step, rows in enumerate(batches):
        positions = rows.batch["position_ids"]
        starts = document_starts(positions, len(positions))
        when = f"at step {step + 1} of the alignment"
        handles = [
            attention_module(source, layer).register_forward_hook(
                _matching(mixer, starts, partial(check_loss, layer=layer, when=when, stage=stage)),
                with_kwargs=True,
            )
            for layer, mixer in mixers.items()
        ]
        try:
            with torch.no_grad():
                run_layers(source, rows.batch)
        finally:
            for handle in handles:
                handle.remove()
        take_step(optimizer, step, stage, groups)
        on_step(step + 1)


def _matching(mixer: MixerLayer, starts: Tensor | None, check: Callable[[float], Any]) -> Callable[..., None]:
    """A hook on attention: backward of a mixer's relative squared error, right away, so that nothing piles up."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        target = output[0].float()
        with torch.enable_grad():
            given, _none = mixer(hidden.detach(), mixer_starts=starts)
            loss = (given.float() - target).square().mean() / target.square().mean().clamp(min=1e-12)
            check(float(loss.detach()))
            loss.backward()

    return hook


def _save(file: Path, key: str, mixers: dict[int, MixerLayer]) -> None:
    tensors = {
        f"{layer}.{name}": tensor.detach().cpu().contiguous()
        for layer, mixer in mixers.items()
        for name, tensor in mixer.state_dict().items()
    }
    write_whole(file, save(tensors, metadata={"identity": json.dumps(key)}))


def _load(file: Path, key: str, mixers: dict[int, MixerLayer]) -> bool:
    """Fill the mixers from a file of the same settings, data and models; say whether there was one."""
    try:
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get("identity") != json.dumps(key):
                return False
            for layer, mixer in mixers.items():
                mixer.load_state_dict({name: opened.get_tensor(f"{layer}.{name}") for name in mixer.state_dict()})
    except (OSError, SafetensorError):
        return False
    return True

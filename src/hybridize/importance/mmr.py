"""MIL-Mamba replacement (arXiv 2511.02651): how well a briefly trained mixer stands in for attention.

For each attention layer: swap it for a mixer that starts from its weights, train the mixer alone for a few
steps to follow the frozen teacher (reverse KL over the completions), and measure the loss on held-out rows.
The lower it ends, the less the layer's attention matters.

What makes it cheap: layers below the swapped one never change. From the bottom up, the hidden states that
enter the layer are kept for every batch and moved on by one layer's forward when its turn is over; the
teacher's last hidden states are computed once. Memory: batches x tokens x hidden, twice, in main memory,
however many layers the model has.

Training: Adam (0.9, 0.95), gradients clipped to norm 1, linear warm-up over the first tenth of the steps,
then a cosine down to a tenth of the learning rate. The mixer's weights are fp32; in a half-precision model
the products are made in its precision (autocast).
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.importance.decoder import run_layers, run_up_to
from hybridize.importance.methods import Batch, Request
from hybridize.importance.ranking import write_json
from hybridize.losses import linear_divergence
from hybridize.models import MixerLayer, attention_module, convert_model, layout_of, swap_layer
from hybridize.spec.stages import RankStage
from hybridize.transfer import replace_layer

STATE_FORMAT = "hybridize.ranking-layer/1"

_WARMUP = 0.1
_FLOOR = 0.1


@dataclass(frozen=True)
class LayerResult:
    """One layer's trial.

    Attributes:
        before_nats: loss on the held-out rows with the mixer as initialised, nat per token.
        after_nats: the same after training: the layer's score.
        num_tokens: trained on, prompts included.
        seconds: of the trial.
    """

    before_nats: float
    after_nats: float
    num_tokens: int
    seconds: float


class Rows:
    """A batch with what is computed for it once.

    Attributes:
        batch: `input_ids` and `position_ids`, [rows, length], where the model is.
        valid_T: bool [rows x length], the positions whose next token is part of a completion.
        teacher_hidden_NF: the teacher's last hidden states at those N positions, in main memory.
        layer: the decoder layer that `hidden` enters.
        hidden: [rows, length, hidden], in main memory; None at layer 0, whose input is cheap.
    """

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.batch = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
        self.valid_T = batch["valid"].flatten().to(device)
        self.teacher_hidden_NF: Tensor | None = None
        self.layer = 0
        self.hidden: Tensor | None = None

    @torch.no_grad()
    def see_teacher(self, teacher: Any) -> None:
        """Compute the teacher's last hidden states."""
        hidden = run_layers(teacher, self.batch).flatten(0, 1)
        self.teacher_hidden_NF = hidden[self.valid_T].cpu()

    @torch.no_grad()
    def advance(self, model: Any, layer: int) -> None:
        """Move on to a higher layer's input; `model` must be as it was before any swap."""
        if layer > self.layer:
            hidden = run_up_to(model, self.batch, layer, first=self.layer, hidden=self._entering())
            self.hidden, self.layer = hidden.cpu(), layer

    def loss(self, model: Any, teacher: Any, *, checkpoint: bool = False) -> Tensor:
        """Summed reverse KL of the model against the teacher, in nat, over the valid positions."""
        hidden = run_layers(
            model, self.batch, first=self.layer, hidden=self._entering(), checkpoint=checkpoint
        ).flatten(0, 1)
        student_head, teacher_head = model.get_output_embeddings(), teacher.get_output_embeddings()
        assert self.teacher_hidden_NF is not None
        return linear_divergence(
            hidden[self.valid_T],
            student_head.weight,
            self.teacher_hidden_NF.to(hidden.device),
            teacher_head.weight,
            student_bias_V=getattr(student_head, "bias", None),
            teacher_bias_V=getattr(teacher_head, "bias", None),
            reduction="sum",
        )

    def _entering(self) -> Tensor | None:
        return None if self.hidden is None else self.hidden.to(self.valid_T.device)


def score_layers(request: Request) -> tuple[dict[int, LayerResult], float]:
    """Try every layer of a request, those that an earlier run has finished excepted.

    Returns:
        The results by layer, and the seconds that earlier runs spent on the layers found finished.

    Raises:
        ValueError: the batches do not fit the stage, or a loss is not finite.
    """
    stage, teacher = request.stage, request.teacher
    _check_batches(request)
    key = _key(request)
    results = {}
    for layer in request.layers:
        finished = _read_result(_state_file(request.state_dir, layer), key, layer)
        if finished is not None:
            results[layer] = finished
    spent_before = sum(result.seconds for result in results.values())
    total = len(request.layers) * stage.steps
    done = len(results) * stage.steps
    if request.on_progress:
        request.on_progress(done, total)
    if len(results) == len(request.layers):
        return results, spent_before

    student = convert_model(request.model, layout_of(request.model.config), share=True)
    student = student.requires_grad_(False).eval()
    was_training = teacher.training
    teacher.eval()
    try:
        batches = [Rows(batch, student.device) for batch in request.batches]
        heldout = [Rows(batch, student.device) for batch in request.heldout]
        for rows in (*batches, *heldout):
            rows.see_teacher(teacher)
        for layer in request.layers:
            if layer in results:
                continue
            for rows in (*batches, *heldout):
                rows.advance(student, layer)

            def on_step(step: int, before: int = done) -> None:
                if request.on_progress:
                    request.on_progress(before + step, total)

            results[layer] = _try_layer(request, student, layer, batches, heldout, on_step)
            done += stage.steps
            state = {"format": STATE_FORMAT, "key": key, "layer": layer, **asdict(results[layer])}
            write_json(_state_file(request.state_dir, layer), state)
    finally:
        teacher.train(was_training)
    return {layer: results[layer] for layer in request.layers}, spent_before


def rate_at(step: int, stage: RankStage) -> float:
    """The learning rate of a step, 0-based: warm-up, then cosine."""
    warmup = math.ceil(_WARMUP * stage.steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, stage.steps - warmup)
    return stage.learning_rate * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * share)) / 2)


def _try_layer(
    request: Request,
    student: Any,
    layer: int,
    batches: Sequence[Rows],
    heldout: Sequence[Rows],
    on_step: Any,
) -> LayerResult:
    """Swap a layer, train its mixer, measure, and put the attention back."""
    stage, teacher = request.stage, request.teacher
    started = time.perf_counter()
    old = replace_layer(student, layer, stage.mixer, stage.init, stage.seed)
    try:
        mixer = _mixer_of(student, layer).cast(torch.float32).requires_grad_(True)
        parameters = list(mixer.parameters())
        optimizer = torch.optim.Adam(parameters, lr=stage.learning_rate, betas=(0.9, 0.95))
        with _autocast(student):
            before = _measure(student, teacher, heldout, stage, layer)
        for step, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, stage)
            with _autocast(student):
                loss = rows.loss(student, teacher, checkpoint=request.checkpoint)
            loss = loss / rows.valid_T.sum().clamp(min=1)
            _check_finite(float(loss.detach()), layer, f"at step {step + 1}", stage)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            on_step(step + 1)
        with _autocast(student):
            after = _measure(student, teacher, heldout, stage, layer)
    finally:
        swap_layer(student, layer, old)
    num_tokens = sum(rows.valid_T.numel() for rows in batches)
    return LayerResult(before, after, num_tokens, time.perf_counter() - started)


@torch.no_grad()
def _measure(student: Any, teacher: Any, heldout: Sequence[Rows], stage: RankStage, layer: int) -> float:
    """Loss over all held-out rows, nat per token."""
    total = sum(float(rows.loss(student, teacher)) for rows in heldout)
    loss = total / sum(int(rows.valid_T.sum()) for rows in heldout)
    _check_finite(loss, layer, "on the held-out rows", stage)
    return loss


def _mixer_of(student: Any, layer: int) -> MixerLayer:
    module = attention_module(student, layer)
    assert isinstance(module, MixerLayer)
    return module


def _autocast(model: Any) -> torch.autocast:
    """Half-precision products in a half-precision model, whose swapped mixer is fp32; else nothing."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(
        model.device.type, dtype=model.dtype if half else torch.bfloat16, enabled=half, cache_enabled=False
    )


def _check_finite(loss: float, layer: int, when: str, stage: RankStage) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"layer {layer}: the loss is {loss} {when}; lower learning_rate (now {stage.learning_rate:g}), "
            "or check that teacher and model are sound. The layers ranked so far are kept"
        )


def _check_batches(request: Request) -> None:
    stage = request.stage
    if len(request.batches) != stage.steps:
        raise ValueError(f"batches: {len(request.batches)} are given for {stage.steps} steps; give one for each step")
    if not any(bool(batch["valid"].any()) for batch in request.heldout):
        raise ValueError(
            "heldout: it has no completion token to measure the loss on; hold out more rows, or longer ones"
        )


def _state_file(state_dir: Path, layer: int) -> Path:
    return state_dir / f"layer-{layer}.json"


def _read_result(file: Path, key: str, layer: int) -> LayerResult | None:
    """A finished layer's result; None if there is none, or it is of other settings, data or models."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if (state["format"], state["key"], state["layer"]) != (STATE_FORMAT, key, layer):
            return None
        return LayerResult(**{name: state[name] for name in LayerResult.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(request: Request) -> str:
    """A hash of all that a layer's result depends on: settings, rows, and a sample of each model tensor."""
    digest = hashlib.sha256()
    settings = request.stage.model_dump(mode="json", exclude={"name", "kind"})
    digest.update(json.dumps([STATE_FORMAT, settings], sort_keys=True).encode())
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

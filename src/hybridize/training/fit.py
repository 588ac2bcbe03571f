"""Fitting each mixer alone to the attention it replaced, all of them at once, before any distillation.

The teacher runs once per batch. What enters a replaced layer's attention there (after the norm) enters the mixer, and
what the attention gives (before it is added to the residual stream) is what the mixer is to give. No layer of the
student runs, and no mixer's input depends on another mixer.

Shapes: R rows (one long one for flash attention), L tokens of a row, E the hidden size, K fitted layers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridize.data.packing import PackedRows
from hybridize.models import MixerLayer, attention_module, find_family, layout_of
from hybridize.models.hybrid import document_starts
from hybridize.spec.stages import FitStage
from hybridize.training.core import OnLog, Run
from hybridize.training.divergence import decoder_inputs
from hybridize.training.metrics import MetricsFile
from hybridize.training.run import TrainResult, carry_out, identity_of, rows_of, rows_per_step

Streams = list[tuple[Tensor, Tensor]]
"""Per layer what enters attention and what it gives, both [R, L, E]."""


class Mixers(nn.Module):
    """A student's mixers by themselves: what a fit trains and saves.

    A sliding window is not among them: it is the attention itself, with nothing new to be fitted.

    Args:
        student: a hybrid; the mixers stay its own.
        recompute: compute a mixer again in backward instead of keeping its activations.
    """

    def __init__(self, student: Any, recompute: bool) -> None:
        super().__init__()
        modules = {layer: attention_module(student, layer) for layer in layout_of(student.config).replaced}
        self.layers = nn.ModuleDict(
            {str(layer): module for layer, module in modules.items() if isinstance(module, MixerLayer)}
        )
        self.recompute = recompute

    @property
    def fitted(self) -> list[int]:
        """Layers with something to train, in order."""
        trained = {name for name, mixer in self.layers.items() if any(p.requires_grad for p in mixer.parameters())}
        return [int(name) for name in self.layers if name in trained]

    def forward(self, streams: Streams, starts_RL: Tensor | None, present_RL: Tensor) -> Tensor:
        """Squared errors of the fitted mixers, [K], summed over channels and the tokens that are no padding."""
        errors = []
        for layer, (input_RLE, target_RLE) in zip(self.fitted, streams, strict=True):
            mixer = self.layers[str(layer)]
            assert isinstance(mixer, MixerLayer)
            input_RLE = input_RLE.to(next(mixer.parameters()).dtype)
            if self.recompute:
                output_RLE, _ = checkpoint(mixer, input_RLE, mixer_starts=starts_RL, use_reentrant=False)
            else:
                output_RLE, _ = mixer(input_RLE, mixer_starts=starts_RL)
            errors.append(_sum_of_squares(output_RLE - target_RLE, present_RL))
        return torch.stack(errors)


class FitTrainer(Run):
    """Trains mixers on the streams of a teacher.

    Args:
        mixers: what to train.
        teacher: frozen, in evaluation mode, on the training device.
        first_rows: rows of the first step, on which the size of the targets is measured.
        **run: see `Run`.
    """

    loss_key = "loss_relative"
    loss_unit = "of the target's mean square"

    def __init__(self, mixers: Mixers, teacher: Any, first_rows: PackedRows, **run: Any) -> None:
        super().__init__(model=mixers, **run)
        self.teacher, self.fitted = teacher, mixers.fitted
        self.mean_squares_K = self._measure_targets(first_rows)
        self.errors_K = torch.zeros_like(self.mean_squares_K)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens of a batch are no padding."""
        return batch["present"].sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The batch's share of the step's mean relative error, over tokens and layers."""
        assert num_items_in_batch is not None
        assert not return_outputs
        streams, starts_RL, present_RL = attention_streams(self.teacher, self.fitted, inputs)
        device = present_RL.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            errors_K = model(streams, starts_RL, present_RL)
        errors_K = errors_K / self.mean_squares_K / num_items_in_batch
        self.errors_K += errors_K.detach()
        return errors_K.mean() * self.args.world_size

    def details(self) -> dict[str, Any]:
        """Each layer's share of the loss."""
        losses = self.over_processes(self.errors_K).tolist()
        self.errors_K = torch.zeros_like(self.errors_K)
        return {"loss_by_layer": dict(zip(map(str, self.fitted), losses, strict=True))}

    def _measure_targets(self, rows: PackedRows) -> Tensor:
        """The mean square of what each layer's attention gives, per token, [K]."""
        total_K = torch.zeros(len(self.fitted), device=self.args.device)
        num_tokens = torch.zeros((), device=self.args.device)
        for index in range(self.args.process_index, len(rows), self.args.world_size):
            batch = {name: tensor.to(self.args.device) for name, tensor in collate(rows, [rows[index]]).items()}
            streams, _, present_RL = attention_streams(self.teacher, self.fitted, batch)
            total_K = total_K + torch.stack([_sum_of_squares(target, present_RL) for _, target in streams])
            num_tokens += present_RL.sum()
        return self.over_processes(total_K) / self.over_processes(num_tokens)


def fit(
    student: Any,
    teacher: Any,
    rows: PackedRows,
    stage: FitStage,
    out_dir: str | Path,
    *,
    on_log: OnLog | None = None,
) -> TrainResult:
    """Fit a student's mixers, in place, each to the attention of its layer in the teacher.

    The loss is, averaged over the fitted layers, the squared error over the mean square of the target: 0 is perfect, 1
    is as good as silence. Errors are taken at all tokens that are no padding, prompts included: at every one of them
    the layer must do the attention's work. The mean square of a layer's target is measured once, on the rows of the
    first step, and divides all its errors, so that a step's loss does not depend on how it is cut into batches.

    Resumes like `distill`, with the same bits on a CPU. Checkpoints hold the mixers only.

    Args:
        student: a hybrid. Its mixers become fp32 and are trained, but for those that `stage.freeze` names; all other
            tensors keep their bits. It is left in evaluation mode, on the training device.
        teacher: the model whose attention was replaced; moved to the training device, run in its own dtype.
        rows: packed rows, at least `stage.steps` times those of a step; used in their order.
        stage: all settings.
        out_dir: gets `metrics.jsonl`, a line per step, and `checkpoints/`, the last two.
        on_log: called after each step with its record and the number of all steps. As for `distill`, but with
            `loss_relative`, and `loss_by_layer`, the same for each fitted layer by its number.

    Raises:
        ValueError: the student has no mixer or another shape than the teacher; the rows, the freezing or the
            existing checkpoints do not go with the stage.
        DivergedError: loss, gradients or weights are no longer finite.

    Source: matching the mixer's output before distillation as in MOHAWK's second stage (arXiv 2408.10189), but at the
    attention's own inputs and for all layers at once.
    """
    _check_pair(student, teacher)
    rows = rows_of(stage, rows)
    identity = identity_of(stage, rows=rows.digest())
    mixers = Mixers(student, stage.gradient_checkpointing)
    num_rows = rows_per_step(stage)
    ends = rows.offsets[num_rows::num_rows].tolist()

    def make(args: Any, metrics: MetricsFile) -> Run:
        return FitTrainer(
            mixers.train(),
            teacher,
            rows.part(0, num_rows),
            metrics=metrics,
            identity=identity,
            on_log=on_log,
            progress=[(end, end) for end in ends],
            args=args,
            train_dataset=rows,
            data_collator=lambda batch: collate(rows, batch),
        )

    return carry_out(
        student, stage, Path(out_dir), identity, make, num_rows_per_step=num_rows, teacher=teacher, trained=mixers
    )


@torch.no_grad()
def attention_streams(
    teacher: Any, layers: Sequence[int], batch: dict[str, Tensor]
) -> tuple[Streams, Tensor | None, Tensor]:
    """Run a teacher and catch what enters some layers' attention and what it gives.

    Args:
        teacher: a causal language model; run in its own dtype.
        layers: their numbers.
        batch: `input_ids`, `position_ids` and `present`, [rows, length], on the teacher's device.

    Returns:
        The streams of the layers in their order; where documents start and which tokens are no padding, both bool
        [R, L], the former None if every row is one document.
    """
    caught: dict[int, tuple[Tensor, Tensor]] = {}

    def catch(layer: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            caught[layer] = (args[0] if args else kwargs["hidden_states"]), output[0]

        return hook

    handles = [
        attention_module(teacher, layer).register_forward_hook(catch(layer), with_kwargs=True) for layer in layers
    ]
    inputs = decoder_inputs(teacher, batch)
    position_ids = inputs["position_ids"]
    try:
        with torch.autocast(position_ids.device.type, enabled=False):
            teacher.base_model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    starts_RL = document_starts(position_ids, len(position_ids))
    return [caught[layer] for layer in layers], starts_RL, batch["present"].reshape(position_ids.shape)


def collate(rows: PackedRows, batch: Sequence[Any]) -> dict[str, Tensor]:
    """Tensors of some rows as `PackedRows.collate` makes them, and `present`: which tokens are no padding."""
    tensors = rows.collate(batch)
    sizes = torch.tensor([len(row["input_ids"]) for row in batch])
    return tensors | {"present": torch.arange(rows.sequence_length) < sizes[:, None]}


def _sum_of_squares(values_RLE: Tensor, present_RL: Tensor) -> Tensor:
    wide = torch.promote_types(values_RLE.dtype, torch.float32)
    return (values_RLE.to(wide).square().sum(-1) * present_RL).sum()


def _check_pair(student: Any, teacher: Any) -> None:
    """Raise a `ValueError` unless the student has mixers in place of the teacher's attention."""
    replaced = [attention_module(student, layer) for layer in layout_of(student.config).replaced]
    if not any(isinstance(module, MixerLayer) and list(module.parameters()) for module in replaced):
        raise ValueError("student: it has no mixer to fit; convert layers first")
    for name in ("num_hidden_layers", "hidden_size"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(f"student: its {name} is {ours}, the teacher's {theirs}; give the teacher it was made of")
    ours, theirs = (find_family(model.config.model_type).model_type for model in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"student: it is made of a {ours}, but the teacher is a {theirs}; give the teacher it was made of"
        )

"""A batch of packed rows with what is computed for it once: cheap sweeps over layers are made of these.

Layers below a changed one never change. From the bottom up, the hidden states that enter the layer are kept for
every batch and moved on by one layer's forward when its turn is over. Memory: tokens x hidden for every batch, in
main memory, however many layers the model has; and as much again where the teacher's last hidden states are kept.

Shapes: T positions of a batch, N valid ones, C in a chunk, V vocabulary, E and F the model's and the teacher's width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hybridize.importance.decoder import run_layers, run_up_to
from hybridize.importance.request import Batch
from hybridize.losses import linear_divergence
from hybridize.models import convert_model, layout_of, logit_rule_of

_CHUNK_TOKENS = 1024


def shared_copy(model: Any) -> Any:
    """A hybrid of the same layout that shares its weights with a model, frozen, in evaluation mode.

    Its layers may be swapped and their forwards replaced; the model itself stays as it is.
    """
    return convert_model(model, layout_of(model.config), share=True).requires_grad_(False).eval()


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

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch, prompts and padding included."""
        return self.valid_T.numel()

    @property
    def num_valid(self) -> int:
        """Positions that count."""
        return int(self.valid_T.sum())

    @torch.no_grad()
    def see_teacher(self, teacher: Any) -> None:
        """Compute the teacher's last hidden states, in its own dtype."""
        with torch.autocast(self.valid_T.device.type, enabled=False):
            hidden = run_layers(teacher, self.batch).flatten(0, 1)
        self.teacher_hidden_NF = hidden[self.valid_T].cpu()

    @torch.no_grad()
    def advance(self, model: Any, layer: int) -> None:
        """Move on to a higher layer's input; below it, `model` must be as it was before any change."""
        if layer > self.layer:
            hidden = run_up_to(model, self.batch, layer, first=self.layer, hidden=self._entering())
            self.hidden, self.layer = hidden.cpu(), layer

    def divergence(self, model: Any, teacher: Any, *, checkpoint: bool = False) -> Tensor:
        """Summed reverse KL of the model against the teacher, in nat, over the valid positions."""
        student_head, teacher_head = model.get_output_embeddings(), teacher.get_output_embeddings()
        rule, teacher_rule = logit_rule_of(model.config), logit_rule_of(teacher.config)
        hidden_NE = self._final(model, checkpoint=checkpoint)
        assert self.teacher_hidden_NF is not None
        return linear_divergence(
            hidden_NE,
            student_head.weight,
            self.teacher_hidden_NF.to(hidden_NE.device),
            teacher_head.weight,
            student_bias_V=getattr(student_head, "bias", None),
            teacher_bias_V=getattr(teacher_head, "bias", None),
            student_rule=(rule.scale, rule.softcap),
            teacher_rule=(teacher_rule.scale, teacher_rule.softcap),
            reduction="sum",
        )

    @torch.no_grad()
    def cross_entropy(self, model: Any) -> float:
        """Summed negative log-likelihood of the completion tokens, in nat."""
        gold_N = self.batch["input_ids"].roll(-1, dims=1).flatten()[self.valid_T]
        hidden_NE = self._final(model)
        head, rule = model.get_output_embeddings(), logit_rule_of(model.config)
        # Half precision is multiplied as such where the hardware sums it in float32.
        halves = hidden_NE.is_cuda and hidden_NE.dtype == head.weight.dtype != torch.float32
        dtype = hidden_NE.dtype if halves else torch.promote_types(hidden_NE.dtype, torch.float32)
        weight_EV = head.weight.to(dtype).t()
        total = 0.0
        for hidden_CE, gold_C in zip(hidden_NE.split(_CHUNK_TOKENS), gold_N.split(_CHUNK_TOKENS), strict=True):
            logits_CV = torch.mm(hidden_CE.to(dtype), weight_EV, **({"out_dtype": torch.float32} if halves else {}))
            if getattr(head, "bias", None) is not None:
                logits_CV += head.bias
            logits_CV *= rule.scale
            if rule.softcap is not None:
                logits_CV = rule.softcap * torch.tanh(logits_CV / rule.softcap)
            total += float(cross_entropy(logits_CV, gold_C, reduction="sum"))
        return total

    def _final(self, model: Any, *, checkpoint: bool = False) -> Tensor:
        """The model's last hidden states at the valid positions, [N, E]; only layers from `layer` upwards run."""
        hidden = run_layers(model, self.batch, first=self.layer, hidden=self._entering(), checkpoint=checkpoint)
        return hidden.flatten(0, 1)[self.valid_T]

    def _entering(self) -> Tensor | None:
        return None if self.hidden is None else self.hidden.to(self.valid_T.device)


def make_rows(batches: Any, device: torch.device) -> list[Rows]:
    """Rows of several batches."""
    return [Rows(batch, device) for batch in batches]


def check_heldout(heldout: Any) -> None:
    """Raise a `ValueError` if the rows have no token to measure a loss on."""
    if not any(bool(batch["valid"].any()) for batch in heldout):
        raise ValueError(
            "heldout: it has no completion token to measure the loss on; hold out more rows, or longer ones"
        )

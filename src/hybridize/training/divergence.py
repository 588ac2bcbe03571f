"""The divergence of a student from its teacher on a batch of packed rows, without logits of the whole batch.

Shapes: R rows, L tokens of a row, E and F the student's and the teacher's width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hybridize.data.packing import PackedRows
from hybridize.losses import Kind, linear_divergence
from hybridize.models import logit_rule_of


def batch_divergence(
    student: Any, teacher: Any, batch: dict[str, Tensor], kind: Kind, temperature: float = 1.0
) -> Tensor:
    """Sum of the divergences at a batch's valid positions, with a graph for the student.

    On a GPU the student runs in bf16 autocast; the teacher runs in its own dtype everywhere.

    Args:
        student: a causal language model.
        teacher: another, of the same vocabulary, on the same device.
        batch: `input_ids`, `position_ids` and `valid`, all [R, L], as `PackedRows.collate` makes them.
        kind: `reverse_kl`, `forward_kl` or `jsd`.
        temperature: of both distributions.

    Returns:
        A scalar in nat, summed over valid positions.
    """
    device = batch["input_ids"].device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        teacher_hidden = _final_hidden(teacher, batch)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        student_hidden = _final_hidden(student, batch)
        student_head, teacher_head = student.get_output_embeddings(), teacher.get_output_embeddings()
        student_rule, teacher_rule = logit_rule_of(student.config), logit_rule_of(teacher.config)
        return linear_divergence(
            student_hidden,
            student_head.weight,
            teacher_hidden,
            teacher_head.weight,
            kind=kind,
            temperature=temperature,
            valid_T=batch["valid"].flatten(),
            student_bias_V=getattr(student_head, "bias", None),
            teacher_bias_V=getattr(teacher_head, "bias", None),
            student_rule=(student_rule.scale, student_rule.softcap),
            teacher_rule=(teacher_rule.scale, teacher_rule.softcap),
            reduction="sum",
        )


def heldout_divergence(
    student: Any,
    teacher: Any,
    rows: PackedRows,
    kind: Kind = "reverse_kl",
    *,
    temperature: float = 1.0,
    rows_per_batch: int = 1,
) -> float:
    """Divergence of a student from its teacher on rows that it was not trained on.

    Args:
        student: a causal language model; left in the mode it is in, but run in evaluation mode.
        teacher: another, of the same vocabulary; moved to the student's device.
        rows: packed rows.
        kind: `reverse_kl`, `forward_kl` or `jsd`.
        temperature: of both distributions.
        rows_per_batch: rows computed at a time.

    Returns:
        Nat per completion token.

    Raises:
        ValueError: there are no completion tokens.
    """
    num_valid = rows.stats["num_completion_tokens"]
    if not num_valid:
        raise ValueError("rows: they hold no completion token to compare at; pack more rows")
    teacher.to(student.device)
    modes = student.training, teacher.training
    student.eval()
    teacher.eval()
    total = 0.0
    own = torch.Generator()  # a loader draws a number, which must not be the training's
    loader: DataLoader = DataLoader(rows, batch_size=rows_per_batch, collate_fn=rows.collate, generator=own)
    with torch.no_grad():
        for batch in loader:
            batch = {name: tensor.to(student.device) for name, tensor in batch.items()}
            total += batch_divergence(student, teacher, batch, kind, temperature).item()
    student.train(modes[0])
    teacher.train(modes[1])
    return total / num_valid


def decoder_inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What a batch of packed rows is to a model's base model.

    Args:
        model: a causal language model.
        batch: `input_ids` and `position_ids`, [R, L].
    """
    input_ids, position_ids = batch["input_ids"], batch["position_ids"]
    if is_flat(model):
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    return {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}


def is_flat(model: Any) -> bool:
    """Whether a model wants a batch as one long row: flash attention looks for packed documents in no other."""
    return "flash" in (getattr(model.config, "_attn_implementation", None) or "")


def _final_hidden(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states after the last norm, [R L, E]."""
    return model.base_model(**decoder_inputs(model, batch)).last_hidden_state.flatten(0, 1)

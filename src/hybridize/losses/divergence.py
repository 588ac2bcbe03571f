"""The divergences as formulas over whole logits: the ground truth, readable, differentiated by autograd.

Shapes: T tokens, V vocabulary. Throughout, q is the student's distribution and p the teacher's.

- `reverse_kl`: KL(q ‖ p) = Σ q log(q/p). Mode-seeking; what staged distillation of hybrids uses.
- `forward_kl`: KL(p ‖ q) = Σ p log(p/q). Classical distillation (Hinton et al., 2015, arXiv:1503.02531).
- `jsd`: β KL(p ‖ m) + (1−β) KL(q ‖ m) with m = β p + (1−β) q, the generalised Jensen-Shannon divergence of
  Agarwal et al. (2024, arXiv:2306.13649). At β = 0.5 it is symmetric and at most log 2.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["reverse_kl", "forward_kl", "jsd"]
Reduction = Literal["mean", "sum"]
KINDS: tuple[str, ...] = get_args(Kind)


def dense_divergence(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    kind: Kind = "reverse_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    valid_T: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence between student and teacher from whole logits; for tests and small vocabularies.

    Args:
        student_logits_TV: the student's logits [T, V]; the only argument that receives a gradient.
        teacher_logits_TV: the teacher's logits [T, V], detached.
        kind: which divergence, see the module's docstring.
        beta: the teacher's share of the mixture, in (0, 1); read by `jsd` only.
        temperature: both logits are divided by it. The result is not multiplied by its square.
        valid_T: bool [T]; tokens that count. All of them when left out.
        reduction: `mean` over valid tokens, or their `sum`.

    Returns:
        A scalar, in nat per token (`mean`) or nat (`sum`), in float32 or wider. Zero without valid tokens.

    Raises:
        ValueError: an unknown kind or reduction, a beta or temperature out of range, or shapes that disagree.
    """
    check_options(kind, beta, temperature, reduction)
    if student_logits_TV.shape != teacher_logits_TV.shape:
        shapes = f"student logits {list(student_logits_TV.shape)}, teacher logits {list(teacher_logits_TV.shape)}"
        raise ValueError(f"{shapes}: they must have one shape; give both models the same vocabulary")
    check_valid(valid_T, student_logits_TV.shape[0])
    if valid_T is not None:
        student_logits_TV, teacher_logits_TV = student_logits_TV[valid_T], teacher_logits_TV[valid_T]
    log_q = _log_softmax(student_logits_TV, temperature)
    log_p = _log_softmax(teacher_logits_TV.detach(), temperature)
    if kind == "reverse_kl":
        per_token = _kl(log_q, log_p)
    elif kind == "forward_kl":
        per_token = _kl(log_p, log_q)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        per_token = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return per_token.sum() / (max(len(per_token), 1) if reduction == "mean" else 1)


def check_options(kind: str, beta: float, temperature: float, reduction: str) -> None:
    """Raise a `ValueError` that names the option at fault and what it may be."""
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta: {beta} is outside (0, 1); for the ends use kind='forward_kl' or 'reverse_kl'")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be above 0")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: {reduction!r} is unknown; use 'mean' or 'sum'")


def check_valid(valid_T: Tensor | None, num_tokens: int) -> None:
    """Raise a `ValueError` unless the mask is left out or is a bool for every token."""
    if valid_T is not None and (valid_T.dtype != torch.bool or valid_T.shape != (num_tokens,)):
        raise ValueError(
            f"valid_T: needs bool [{num_tokens}], got {valid_T.dtype} {list(valid_T.shape)}; "
            "flatten it like the hidden states, e.g. (labels != -100).flatten()"
        )


def _log_softmax(logits_TV: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return torch.log_softmax(logits_TV.to(wide) / temperature, dim=-1)


def _kl(log_a_TV: Tensor, log_b_TV: Tensor) -> Tensor:
    return (log_a_TV.exp() * (log_a_TV - log_b_TV)).sum(-1)

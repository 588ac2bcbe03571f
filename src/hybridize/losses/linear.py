"""The divergences from hidden states and output heads, a chunk of tokens at a time.

Shapes: T tokens, N valid ones, C in a chunk, V vocabulary, E and F the student's and the teacher's width.

One pass: a chunk's logits give its divergence and, in closed form, the gradient on the student's logits,
which is carried back to the hidden states and the head at once; then the chunk is forgotten. The largest
tensors are [C, V] and the head's own gradient [V, E]. A chunk costs four matrix products with gradients, two
without; nothing is computed again in backward. docs/adr/0002-distillation-loss.md compares the alternatives.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.losses.divergence import Kind, Reduction, check_options, check_valid

LogitRule = tuple[float, float | None]
"""A factor on a head's logits, and a bound on their size (None: no bound)."""


def linear_divergence(
    student_hidden_TE: Tensor,
    student_head_VE: Tensor,
    teacher_hidden_TF: Tensor,
    teacher_head_VF: Tensor,
    *,
    kind: Kind = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    valid_T: Tensor | None = None,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    student_rule: LogitRule = (1.0, None),
    teacher_rule: LogitRule = (1.0, None),
    chunk_tokens: int = 1024,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence between student and teacher, per valid token, never holding logits of more than one chunk.

    Normalised by valid tokens, never by batch or sequence length. To accumulate over micro-batches, take
    `reduction="sum"` and divide by the count of valid tokens in the whole batch (the Trainer's
    `num_items_in_batch`): the result is the same however the batch was cut.

    Args:
        student_hidden_TE: the student's final hidden states [T, E], after its last norm.
        student_head_VE: the student's output head [V, E]; a plain tensor (gather a sharded one first).
        teacher_hidden_TF: the teacher's final hidden states [T, F]; F may differ from E. Detached.
        teacher_head_VF: the teacher's output head [V, F]. Detached.
        kind: `reverse_kl` is KL(student ‖ teacher), `forward_kl` is KL(teacher ‖ student), or `jsd`.
        beta: the teacher's share of the mixture, in (0, 1); read by `jsd` only.
        temperature: both logits are divided by it. The result is not multiplied by its square.
        valid_T: bool [T]; tokens that count. Others are not computed at all and get a gradient of zero.
        student_bias_V: bias of the student's head [V], trained with it.
        teacher_bias_V: bias of the teacher's head [V]. Detached.
        student_rule: (scale, softcap) of the student's logits, which become softcap·tanh(scale·logits/softcap), or
            scale·logits without a softcap; the bias is added before.
        teacher_rule: the same of the teacher's.
        chunk_tokens: tokens whose logits exist at once; memory grows with it, some 5 to 8 x chunk x V floats.
        reduction: `mean` over valid tokens, or their `sum`.

    Returns:
        A scalar, in nat per token (`mean`) or nat (`sum`), in float32 or wider. Without valid tokens it is
        zero and still has a graph (gradients of zero), so that one rank's empty micro-batch stalls nobody.

    Raises:
        ValueError: an unknown kind or reduction, an option out of range, or shapes that disagree.

    Source: gradients q·(log(q/p) − E_q log(q/p)) for KL(q ‖ p), q − p for KL(p ‖ q), and for the generalised
    Jensen-Shannon divergence (arXiv:2306.13649) (1−β)·q·(log(q/m) − KL(q ‖ m)).
    """
    check_options(kind, beta, temperature, reduction)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: {chunk_tokens} must be at least 1")
    for owner, hidden, head, bias in (
        ("student", student_hidden_TE, student_head_VE, student_bias_V),
        ("teacher", teacher_hidden_TF, teacher_head_VF, teacher_bias_V),
    ):
        if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
            raise ValueError(
                f"{owner}: hidden states {list(hidden.shape)} do not fit the head {list(head.shape)}; "
                "use [tokens, width] and [vocabulary, width]"
            )
        if bias is not None and bias.shape != head.shape[:1]:
            raise ValueError(f"{owner}: bias {list(bias.shape)} does not fit the head {list(head.shape)}")
    if len(student_hidden_TE) != len(teacher_hidden_TF) or len(student_head_VE) != len(teacher_head_VF):
        raise ValueError(
            f"student has {len(student_hidden_TE)} tokens and {len(student_head_VE)} words, "
            f"teacher {len(teacher_hidden_TF)} and {len(teacher_head_VF)}; both must agree"
        )
    check_valid(valid_T, len(student_hidden_TE))
    for owner, (scale, softcap) in (("student", student_rule), ("teacher", teacher_rule)):
        if not scale > 0 or (softcap is not None and not softcap > 0):
            raise ValueError(f"{owner}_rule: scale {scale} and softcap {softcap} must be above 0")

    student_hidden_NE, teacher_hidden_NF = student_hidden_TE, teacher_hidden_TF.detach()
    if valid_T is not None:
        chosen_N = valid_T.nonzero().squeeze(-1)
        student_hidden_NE = student_hidden_NE.index_select(0, chosen_N)
        teacher_hidden_NF = teacher_hidden_NF.index_select(0, chosen_N)
    total = _LinearDivergence.apply(
        student_hidden_NE,
        student_head_VE,
        student_bias_V,
        teacher_hidden_NF,
        teacher_head_VF.detach(),
        None if teacher_bias_V is None else teacher_bias_V.detach(),
        student_rule,
        teacher_rule,
        kind,
        beta,
        temperature,
        chunk_tokens,
    )
    return total / max(len(student_hidden_NE), 1) if reduction == "mean" else total


class _LinearDivergence(torch.autograd.Function):
    """The sum over tokens; gradients are made in forward, where the logits are, and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        head_VE: Tensor,
        bias_V: Tensor | None,
        teacher_hidden_NF: Tensor,
        teacher_head_VF: Tensor,
        teacher_bias_V: Tensor | None,
        student_rule: LogitRule,
        teacher_rule: LogitRule,
        kind: str,
        beta: float,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        student = _Head(hidden_NE, head_VE, bias_V, student_rule, temperature)
        teacher = _Head(teacher_hidden_NF, teacher_head_VF, teacher_bias_V, teacher_rule, temperature)
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_NE = torch.empty_like(hidden_NE) if needs_hidden else None
        # Summed over chunks in float32 whatever the weights are, or small contributions are rounded away.
        grad_head_VE = torch.zeros_like(head_VE, dtype=student.wide) if needs_head else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=student.wide) if needs_bias else None
        total = torch.zeros((), dtype=student.wide, device=hidden_NE.device)

        with torch.autocast(hidden_NE.device.type, enabled=False):  # the dtypes are chosen in _Head
            for start in range(0, len(hidden_NE), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                hidden_CE = hidden_NE[rows].to(student.dtype)
                log_q_CV, slope = student.log_probs(hidden_CE)
                log_p_CV, _ = teacher.log_probs(teacher_hidden_NF[rows].to(teacher.dtype))
                per_token_C, grad_CV = _value_and_gradient(
                    log_q_CV, log_p_CV, kind, beta, with_gradient=any(ctx.needs_input_grad)
                )
                total += per_token_C.sum()
                if grad_CV is None:
                    continue
                grad_CV *= slope
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(0)
                grad_CV = grad_CV.to(student.dtype)
                if grad_hidden_NE is not None:
                    grad_hidden_NE[rows] = _matmul(grad_CV, student.weight)
                if grad_head_VE is not None:
                    _add_matmul(grad_head_VE, grad_CV.t(), hidden_CE)
        ctx.save_for_backward(grad_hidden_NE, grad_head_VE, grad_bias_V)
        ctx.dtypes = head_VE.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, bias = ctx.saved_tensors
        head_dtype, bias_dtype = ctx.dtypes
        return (
            None if hidden is None else hidden * grad.to(hidden.dtype),
            None if head is None else (head * grad).to(head_dtype),
            None if bias is None else (bias * grad).to(bias_dtype),
            *(None,) * 9,
        )


class _Head:
    """One model's projection to log-probabilities: the dtype of the product, and that of the softmax."""

    def __init__(
        self, hidden: Tensor, weight_VE: Tensor, bias_V: Tensor | None, rule: LogitRule, temperature: float
    ) -> None:
        device = hidden.device.type
        dtype = torch.promote_types(hidden.dtype, weight_VE.dtype)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        self.wide = torch.promote_types(dtype, torch.float32)
        # Half precision is multiplied as such where the hardware sums it in float32; a CPU gains nothing.
        self.dtype = dtype if device == "cuda" else self.wide
        self.weight = weight_VE.to(self.dtype)
        self.bias = None if bias_V is None else bias_V.to(self.wide)
        self.scale, self.softcap = rule
        self.temperature = temperature

    def log_probs(self, hidden_CE: Tensor) -> tuple[Tensor, Tensor | float]:
        """Log-probabilities [C, V], and how much what goes into softmax changes with the head's output."""
        logits_CV = _matmul(hidden_CE, self.weight.t())
        if self.bias is not None:
            logits_CV += self.bias
        slope: Tensor | float = self.scale / self.temperature
        if self.softcap is None:
            if slope != 1.0:
                logits_CV *= slope
        else:
            bent_CV = logits_CV.mul_(self.scale / self.softcap).tanh_()
            slope = bent_CV.square().neg_().add_(1).mul_(slope)
            logits_CV = bent_CV.mul_(self.softcap / self.temperature)
        return torch.log_softmax(logits_CV, dim=-1), slope


def _value_and_gradient(
    log_q_CV: Tensor, log_p_CV: Tensor, kind: str, beta: float, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence per token [C] and its gradient on the student's (tempered) logits [C, V]."""
    q_CV = log_q_CV.exp()
    if kind == "forward_kl":
        p_CV = log_p_CV.exp()
        value_C = (p_CV * (log_p_CV - log_q_CV)).sum(-1)
        return value_C, q_CV.sub_(p_CV) if with_gradient else None
    if kind == "reverse_kl":
        log_ratio_CV = log_q_CV.sub_(log_p_CV)
        value_C = student_term_C = (q_CV * log_ratio_CV).sum(-1)
        scale = 1.0
    else:
        log_m_CV = torch.logaddexp(log_p_CV + math.log(beta), log_q_CV + math.log(1 - beta))
        log_ratio_CV = log_q_CV.sub_(log_m_CV)
        student_term_C = (q_CV * log_ratio_CV).sum(-1)
        teacher_term_C = (log_p_CV.exp() * log_m_CV.neg_().add_(log_p_CV)).sum(-1)
        value_C = beta * teacher_term_C + (1 - beta) * student_term_C
        scale = 1 - beta
    if not with_gradient:
        return value_C, None
    return value_C, log_ratio_CV.sub_(student_term_C[:, None]).mul_(q_CV).mul_(scale)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """A product whose sums and result are float32 or wider, whatever its operands are."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b)

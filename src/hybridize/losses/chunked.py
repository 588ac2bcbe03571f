"""The divergences and their gradients in plain torch, a chunk of tokens at a time: any device, any dtype.

Shapes: N tokens, C in a chunk, V vocabulary, E and F the student's and the teacher's width.
"""

import math

import torch
from torch import Tensor

LogitRule = tuple[float, float | None]
"""A factor on a head's logits, and a bound on their size (None: no bound)."""


def chunked_divergence(
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
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Sum of the divergences, and its gradients on what `needs` asks for: hidden states, head, bias.

    The arguments are those of `linear_divergence`. Head and bias get theirs in float32 or wider: they are summed over
    chunks, and small contributions would be rounded away in less.
    """
    student = _Head(hidden_NE, head_VE, bias_V, student_rule, temperature)
    teacher = _Head(teacher_hidden_NF, teacher_head_VF, teacher_bias_V, teacher_rule, temperature)
    needs_hidden, needs_head, needs_bias = needs
    grad_hidden_NE = torch.empty_like(hidden_NE) if needs_hidden else None
    grad_head_VE = torch.zeros_like(head_VE, dtype=student.wide) if needs_head else None
    grad_bias_V = torch.zeros_like(bias_V, dtype=student.wide) if needs_bias and bias_V is not None else None
    total = torch.zeros((), dtype=student.wide, device=hidden_NE.device)

    with torch.autocast(hidden_NE.device.type, enabled=False):  # the dtypes are chosen in _Head
        for start in range(0, len(hidden_NE), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden_CE = hidden_NE[rows].to(student.dtype)
            log_q_CV, slope = student.log_probs(hidden_CE)
            log_p_CV, _ = teacher.log_probs(teacher_hidden_NF[rows].to(teacher.dtype))
            per_token_C, grad_CV = _value_and_gradient(log_q_CV, log_p_CV, kind, beta, with_gradient=any(needs))
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
    return total, grad_hidden_NE, grad_head_VE, grad_bias_V


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a head multiplies: autocast's if it is on, or that of its operands."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


class _Head:
    """One model's projection to log-probabilities: the dtype of the product, and that of the softmax."""

    def __init__(
        self, hidden: Tensor, weight_VE: Tensor, bias_V: Tensor | None, rule: LogitRule, temperature: float
    ) -> None:
        dtype = product_dtype(hidden, weight_VE)
        self.wide = torch.promote_types(dtype, torch.float32)
        # Half precision is multiplied as such where the hardware sums it in float32; a CPU gains nothing.
        self.dtype = dtype if hidden.device.type == "cuda" else self.wide
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

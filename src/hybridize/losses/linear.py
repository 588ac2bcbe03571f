"""The divergences from hidden states and output heads, a chunk of tokens at a time.

Shapes: T tokens, N valid ones, C in a chunk, V vocabulary, E and F the student's and the teacher's width.

One pass: a chunk's logits give its divergence and, in closed form, the gradient on the student's logits,
which is carried back to the hidden states and the head; then the chunk is forgotten. The largest tensors are
[C, V] and the head's own gradient [V, E]. A token costs four matrix products with gradients, two without;
nothing is computed again in backward. `fused` does it on a GPU, `chunked` elsewhere and in float64.
docs/adr/0002-distillation-loss.md compares the alternatives.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.losses.chunked import LogitRule, chunked_divergence
from hybridize.losses.divergence import Kind, Reduction, check_options, check_valid
from hybridize.losses.fused import can_fuse, fused_divergence, scale_in_place

_CHUNK_TOKENS = 1024  # of the plain form


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
    chunk_tokens: int | None = None,
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
        chunk_tokens: tokens whose gradient on the logits exists at once; memory grows with it. On a GPU it takes chunk
            x V numbers in the models' dtype and a quarter of that in float32, and None lets them take 1.5 GiB (4096
            tokens of 131,072 words in bf16); else it takes some 5 to 8 x chunk x V floats, and None is 1024.
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
    if chunk_tokens is not None and chunk_tokens < 1:
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
        torch.is_grad_enabled(),
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
        chunk_tokens: int | None,
        with_gradients: bool,
    ) -> Tensor:
        heads = hidden_NE, head_VE, bias_V, teacher_hidden_NF, teacher_head_VF, teacher_bias_V
        options = student_rule, teacher_rule, kind, beta, temperature
        # What needs_input_grad says, it says without a graph, too.
        needs_hidden, needs_head, needs_bias = (with_gradients and need for need in ctx.needs_input_grad[:3])
        needs = needs_hidden, needs_head, needs_bias
        if can_fuse(hidden_NE, head_VE, teacher_hidden_NF, teacher_head_VF):
            total, *gradients = fused_divergence(*heads, *options, chunk_tokens, needs)
        else:
            total, *gradients = chunked_divergence(*heads, *options, chunk_tokens or _CHUNK_TOKENS, needs)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_NE.dtype, head_VE.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Unless the graph is kept for another backward, nobody else reads the gradients: no copy is needed.
        final = not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = (
            None if saved is None else _scale(saved, grad, dtype, in_place=final)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, *(None,) * 10


def _scale(saved: Tensor, grad: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """A gradient times the scalar that came from above, in the dtype of what it belongs to, rounded once."""
    return scale_in_place(saved, grad) if in_place and saved.dtype == dtype else (saved * grad).to(dtype)

"""The divergences and their gradients on a GPU: four matrix products, and one Triton kernel between them.

Shapes: N tokens, S in a span, C in a chunk of it, V vocabulary, E and F the student's and the teacher's width.

Tokens are taken a span at a time, the logits of a span a chunk at a time: float32 logits are needed for the softmaxes
only, and the gradient on them takes a quarter of both models' logits in bfloat16. So the products with the gradient
can be long ones, and the head's gradient [V, E] is read and written once per span. One operator to torch, which
`torch.compile` does not look into.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from hybridize.losses.chunked import LogitRule, product_dtype

_HAS_TRITON = find_spec("triton") is not None
# What the gradient on the logits of a span may take: 4096 tokens of 131,072 words in bfloat16.
_SPAN_BYTES = 2**30
_CHUNKS_PER_SPAN = 8
# Products run in tiles of so many tokens; spans and chunks are multiples of it where they can be.
_TILE_TOKENS = 128
# Up to so many spans, the gradient of a bfloat16 head is summed over them in its own dtype, one rounding each: half the
# memory, for an error of 3.5e-3 of its norm where float32 leaves the 2.3e-3 of a single rounding of everything.
_MAX_ROUNDINGS = 4


def can_fuse(hidden_NE: Tensor, head_VE: Tensor, teacher_hidden_NF: Tensor, teacher_head_VF: Tensor) -> bool:
    """Whether these can take the Triton kernel: on a GPU, nothing wider than float32."""
    if hidden_NE.device.type != "cuda" or not _HAS_TRITON:
        return False
    dtypes = product_dtype(hidden_NE, head_VE), product_dtype(teacher_hidden_NF, teacher_head_VF)
    return torch.float64 not in dtypes


def fused_divergence(
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
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Sum of the divergences, and its gradients on what `needs` asks for: hidden states, head, bias.

    The arguments are those of `linear_divergence`. The gradients have the dtypes of what they belong to; but of a
    float16 head and bias they are in float32, since a sum over tokens may be more than float16 holds.
    """
    total, *gradients = torch.ops.hybridize.linear_divergence(
        hidden_NE,
        head_VE,
        bias_V,
        teacher_hidden_NF,
        teacher_head_VF,
        teacher_bias_V,
        *student_rule,
        *teacher_rule,
        kind,
        beta,
        temperature,
        chunk_tokens,
        product_dtype(hidden_NE, head_VE),
        product_dtype(teacher_hidden_NF, teacher_head_VF),
        *needs,
    )
    grad_hidden, grad_head, grad_bias = (
        gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
    )
    return total, grad_hidden, grad_head, grad_bias


def scale_in_place(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient times a scalar, in its own memory."""
    if gradient.device.type != "cuda" or gradient.dtype == torch.float64 or not _HAS_TRITON:
        return gradient.mul_(factor)
    from hybridize.losses.triton import scale

    scale(gradient, factor)
    return gradient


@torch.library.custom_op("hybridize::linear_divergence", mutates_args=())
def _linear_divergence(
    hidden_NE: Tensor,
    head_VE: Tensor,
    bias_V: Tensor | None,
    teacher_hidden_NF: Tensor,
    teacher_head_VF: Tensor,
    teacher_bias_V: Tensor | None,
    student_scale: float,
    student_cap: float | None,
    teacher_scale: float,
    teacher_cap: float | None,
    kind: str,
    beta: float,
    temperature: float,
    chunk_tokens: int | None,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    needs_hidden: bool,
    needs_head: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum and its gradients; one that is not needed, or whose tensor is left out, is empty."""
    from hybridize.losses.triton import ROW_ALIGNMENT, divergence_rows

    num_tokens, num_words = len(hidden_NE), len(head_VE)
    row_words = _round_up(num_words, ROW_ALIGNMENT)
    needs = needs_hidden, needs_head, needs_bias
    span, chunk = _sizes(num_tokens, row_words * dtype.itemsize, chunk_tokens)
    if not any(needs):
        chunk = min(span, 2 * chunk)  # there is room, and longer products are faster
    num_spans = -(-num_tokens // span)

    def rows_of(num_rows: int, dtype: torch.dtype) -> Tensor:
        return hidden_NE.new_empty(num_rows, row_words, dtype=dtype)[:, :num_words]

    total = hidden_NE.new_zeros((), dtype=torch.float32)
    grad_hidden_NE = hidden_NE.new_empty(hidden_NE.shape if needs_hidden else 0)
    keeps_dtype = _sum_dtype(head_VE) == dtype and num_spans <= _MAX_ROUNDINGS
    sum_dtype = dtype if keeps_dtype else torch.float32
    grad_head_VE = hidden_NE.new_empty(head_VE.shape if needs_head else 0, dtype=sum_dtype)
    grad_bias_V = hidden_NE.new_zeros(num_words if needs_bias else 0, dtype=torch.float32)
    if num_tokens == 0:
        grad_head_VE.zero_()

    with torch.autocast(hidden_NE.device.type, enabled=False):  # the dtypes are chosen already
        weight_VE, teacher_weight_VF = head_VE.to(dtype), teacher_head_VF.to(teacher_dtype)
        logits_CV, teacher_logits_CV = rows_of(chunk, torch.float32), rows_of(chunk, torch.float32)
        gradient_SV = rows_of(span, dtype) if any(needs) else None
        for first in range(0, num_tokens, span):
            last = min(first + span, num_tokens)
            hidden_SE = hidden_NE[first:last].to(dtype)
            for start in range(first, last, chunk):
                stop = min(start + chunk, last)
                logits, teacher_logits = logits_CV[: stop - start], teacher_logits_CV[: stop - start]
                _matmul(hidden_SE[start - first : stop - first], weight_VE.t(), logits)
                _matmul(teacher_hidden_NF[start:stop].to(teacher_dtype), teacher_weight_VF.t(), teacher_logits)
                total += divergence_rows(
                    logits,
                    teacher_logits,
                    None if gradient_SV is None else gradient_SV[start - first : stop - first],
                    student_bias_V=bias_V,
                    teacher_bias_V=teacher_bias_V,
                    student_rule=(student_scale, student_cap),
                    teacher_rule=(teacher_scale, teacher_cap),
                    kind=kind,
                    beta=beta,
                    temperature=temperature,
                )
            if gradient_SV is None:
                continue
            if needs_hidden:
                _matmul(gradient_SV[: last - first], weight_VE, grad_hidden_NE[first:last])
            if needs_head:
                _matmul(gradient_SV[: last - first].t(), hidden_SE, grad_head_VE, add=first > 0)
            if needs_bias:
                grad_bias_V += gradient_SV[: last - first].sum(0, dtype=torch.float32)
    del logits_CV, teacher_logits_CV, gradient_SV  # a sum in float32 is rounded into their place in memory
    grad_bias_V = grad_bias_V.to(_sum_dtype(head_VE if bias_V is None else bias_V))
    return total, grad_hidden_NE, grad_head_VE.to(_sum_dtype(head_VE)), grad_bias_V


@_linear_divergence.register_fake
def _(
    hidden_NE: Tensor, head_VE: Tensor, bias_V: Tensor | None, *options: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_hidden, needs_head, needs_bias = options[-3:]
    bias_or_head = head_VE if bias_V is None else bias_V
    return (
        hidden_NE.new_empty((), dtype=torch.float32),
        hidden_NE.new_empty(hidden_NE.shape if needs_hidden else 0),
        hidden_NE.new_empty(head_VE.shape if needs_head else 0, dtype=_sum_dtype(head_VE)),
        hidden_NE.new_empty(head_VE.shape[0] if needs_bias else 0, dtype=_sum_dtype(bias_or_head)),
    )


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a gradient summed over tokens."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _sizes(num_tokens: int, row_bytes: int, chunk_tokens: int | None) -> tuple[int, int]:
    """Tokens in a span and in a chunk: spans as equal as tiles allow."""
    most = chunk_tokens or max(_TILE_TOKENS, _SPAN_BYTES // row_bytes)
    num_tokens = max(num_tokens, 1)
    num_spans = -(-num_tokens // most)
    span = min(most, _round_up(-(-num_tokens // num_spans), _TILE_TOKENS))
    return span, min(span, _round_up(-(-span // _CHUNKS_PER_SPAN), _TILE_TOKENS))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """The product of a and b into `out`, or added to it; summed in float32, rounded once to the dtype of `out`."""
    if out.dtype == a.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif out.dtype == torch.float32:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        assert not add
        out.copy_(a @ b)

# mypy: allow-untyped-defs
"""The divergences and their gradients from two models' logits, a row at a time, on a GPU.

Shapes: C tokens, V vocabulary. Throughout, q is the student's distribution and p the teacher's, d is the gap between
the logits that enter the two softmaxes, and r = log(q/p) = d − log(Z_q/Z_p).

One program per token. It reads both models' logits once for the normalisers (and E_q d), and once more, from the end
where the cache still holds them, for the value and the gradient; the Jensen-Shannon divergence needs one more reading
in between. Everything is computed in float32. Values are sums of terms that are never negative, q·(r − 1 + e^−r) for
KL(q ‖ p): the two additional sums cancel (Σp = Σq = 1) and with them the error of the normalisers, so that a small
divergence keeps its digits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_WORDS = 4096  # of a program
_NUM_WARPS = 16
# Rows begin at a multiple of this many words, so that they are read in whole vectors whatever the vocabulary is.
ROW_ALIGNMENT = 64


def divergence_rows(
    student_logits_CV: Tensor,
    teacher_logits_CV: Tensor,
    gradient_CV: Tensor | None,
    *,
    student_bias_V: Tensor | None,
    teacher_bias_V: Tensor | None,
    student_rule: tuple[float, float | None],
    teacher_rule: tuple[float, float | None],
    kind: str,
    beta: float,
    temperature: float,
) -> Tensor:
    """Sum of the divergences of rows of logits, and the gradient on what the student's head gave.

    Args:
        student_logits_CV: the student's head's output in float32, [C, V], rows `ROW_ALIGNMENT` words aligned and apart.
        teacher_logits_CV: the teacher's, likewise.
        gradient_CV: takes the gradient, before bias, scale and soft-cap, in any dtype, laid out like the logits; None
            computes the sum only.
        student_bias_V: added to the student's logits.
        teacher_bias_V: added to the teacher's.
        student_rule: (scale, softcap) of the student's logits after the bias.
        teacher_rule: the same of the teacher's.
        kind: one of `KINDS`.
        beta: the teacher's share of the mixture; read by `jsd` only.
        temperature: of both distributions.

    Returns:
        A float32 scalar, in nat.
    """
    num_rows, num_words = student_logits_CV.shape
    stride = student_logits_CV.stride(0)
    for rows in (student_logits_CV, teacher_logits_CV, gradient_CV):
        assert rows is None or (rows.shape == (num_rows, num_words) and rows.stride() == (stride, 1))
    assert stride % ROW_ALIGNMENT == 0
    block = min(max(_BLOCK_WORDS, num_words // _most_parts(student_logits_CV)), num_words)
    block = triton.next_power_of_2(block)
    parts = triton.cdiv(num_words, block)
    values_CP = student_logits_CV.new_empty(num_rows, parts)
    _divergence_kernel[(num_rows * parts,)](
        student_logits_CV,
        teacher_logits_CV,
        student_bias_V,
        teacher_bias_V,
        values_CP,
        gradient_CV,
        student_logits_CV.new_empty(num_rows, 6, parts),
        student_logits_CV.new_zeros(num_rows, dtype=torch.int32),
        stride,
        num_words,
        student_rule[0],
        student_rule[1] or 1.0,
        teacher_rule[0],
        teacher_rule[1] or 1.0,
        1.0 / temperature,
        beta,
        KIND=kind,
        STUDENT_BIAS=student_bias_V is not None,
        TEACHER_BIAS=teacher_bias_V is not None,
        STUDENT_CAP=student_rule[1] is not None,
        TEACHER_CAP=teacher_rule[1] is not None,
        WITH_GRADIENT=gradient_CV is not None,
        PARTS=parts,
        PARTS_CEIL=triton.next_power_of_2(parts),
        BLOCK=block,
        num_warps=min(32, max(1, _NUM_WARPS * block // _BLOCK_WORDS)),
    )
    return values_CP.sum()


def _most_parts(tensor: Tensor) -> int:
    """Programs that a row may have: fewer than run at once, since they wait for one another."""
    if tensor.device.type != "cuda":
        return 1
    return max(1, torch.cuda.get_device_properties(tensor.device).multi_processor_count // 2)


@triton.jit
def _tempered(row_ptr, bias_ptr, word, stride, num_words, scale, cap, inverse_temperature, BIAS, CAP):
    """A block of what goes into softmax (−inf beyond the vocabulary), and its slope in the head's output."""
    logit = tl.load(row_ptr + word, mask=word < stride, other=0.0)
    if BIAS:
        logit += tl.load(bias_ptr + word, mask=word < num_words, other=0.0)
    slope = scale * inverse_temperature
    if CAP:
        # tanh from e^(−2|x|): its slope 1 − tanh² = 4e / (1 + e)² then needs no difference.
        bent = logit * (scale / cap)
        e = tl.exp(-2.0 * tl.abs(bent))
        tanh = tl.where(bent < 0, e - 1.0, 1.0 - e) / (1.0 + e)
        logit = tanh * (cap * inverse_temperature)
        slope = slope * 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        logit = logit * slope
    return tl.where(word < num_words, logit, float("-inf")), slope


@triton.jit
def _excess(r):
    """The series of r − 1 + e^−r for |r| < 1/4, to 4e-7 of itself."""
    return r * r * (1 / 2 + r * (-1 / 6 + r * (1 / 24 + r * (-1 / 120 + r * (1 / 720)))))


@triton.jit
def _mixture_excess(r, beta):
    """(β p log(p/m) + (1−β) q log(q/m)) / q = β φ(x) − φ(β x) with φ(x) = (1+x) log(1+x) − x and 1 + x = p/q."""
    x = _excess(r) - r
    y = beta * x
    first = x * x * (1 / 2 + x * (-1 / 6 + x * (1 / 12 + x * (-1 / 20 + x * (1 / 30)))))
    second = y * y * (1 / 2 + y * (-1 / 6 + y * (1 / 12 + y * (-1 / 20 + y * (1 / 30)))))
    return beta * first - second


@triton.jit
def _log_shares(r, beta):
    """log(q/m) and log(p/m) for the mixture m = β p + (1−β) q."""
    e = tl.exp(-tl.abs(r))
    student = tl.minimum(r, 0.0) - tl.log(tl.where(r < 0, beta + (1.0 - beta) * e, (1.0 - beta) + beta * e))
    return student, student - r


@triton.jit
def _meet(arrivals_ptr, expected):
    """Wait until the programs of a row have all come here, and see what they stored before."""
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") + 1
    while arrived < expected:
        arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _divergence_kernel(
    student_ptr,
    teacher_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    value_ptr,
    gradient_ptr,
    partial_ptr,
    arrivals_ptr,
    stride,
    num_words,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    inverse_temperature,
    beta,
    KIND: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_CEIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See the module's docstring."""
    row = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    word = part * BLOCK + tl.arange(0, BLOCK)
    valid = word < num_words
    parts = tl.arange(0, PARTS_CEIL)
    place = row.to(tl.int64) * stride
    partial_ptr += row * (6 * PARTS)
    arrivals_ptr += row

    s, slope = _tempered(
        student_ptr + place, student_bias_ptr, word, stride, num_words,
        student_scale, student_cap, inverse_temperature, STUDENT_BIAS, STUDENT_CAP,
    )  # fmt: skip
    t, _ = _tempered(
        teacher_ptr + place, teacher_bias_ptr, word, stride, num_words,
        teacher_scale, teacher_cap, inverse_temperature, TEACHER_BIAS, TEACHER_CAP,
    )  # fmt: skip
    gap = tl.where(valid, s - t, 0.0)
    student_max = tl.max(s, 0)
    teacher_max = tl.max(t, 0)
    q = tl.exp(s - student_max)
    p = tl.exp(t - teacher_max)
    student_sum = tl.sum(q, 0)
    teacher_sum = tl.sum(p, 0)
    gap_sum = 0.0
    if KIND == "reverse_kl":
        gap_sum = tl.sum(q * gap, 0)
    if PARTS > 1:
        tl.store(partial_ptr + part, student_max)
        tl.store(partial_ptr + PARTS + part, student_sum)
        tl.store(partial_ptr + 2 * PARTS + part, teacher_max)
        tl.store(partial_ptr + 3 * PARTS + part, teacher_sum)
        if KIND == "reverse_kl":
            tl.store(partial_ptr + 4 * PARTS + part, gap_sum)
        _meet(arrivals_ptr, PARTS)
        there = parts < PARTS
        max_P = tl.load(partial_ptr + parts, mask=there, other=float("-inf"), cache_modifier=".cg")
        sum_P = tl.load(partial_ptr + PARTS + parts, mask=there, other=0.0, cache_modifier=".cg")
        own_max = student_max
        student_max = tl.max(max_P, 0)
        rescale_P = tl.exp(max_P - student_max)
        student_sum = tl.sum(sum_P * rescale_P, 0)
        q = q * tl.exp(own_max - student_max)
        if KIND == "reverse_kl":
            gap_P = tl.load(partial_ptr + 4 * PARTS + parts, mask=there, other=0.0, cache_modifier=".cg")
            gap_sum = tl.sum(gap_P * rescale_P, 0)
        max_P = tl.load(partial_ptr + 2 * PARTS + parts, mask=there, other=float("-inf"), cache_modifier=".cg")
        sum_P = tl.load(partial_ptr + 3 * PARTS + parts, mask=there, other=0.0, cache_modifier=".cg")
        own_max = teacher_max
        teacher_max = tl.max(max_P, 0)
        teacher_sum = tl.sum(sum_P * tl.exp(max_P - teacher_max), 0)
        p = p * tl.exp(own_max - teacher_max)
    q = q * (1.0 / student_sum)
    p = p * (1.0 / teacher_sum)
    r = tl.where(valid, gap - ((student_max - teacher_max) + tl.log(student_sum / teacher_sum)), 0.0)

    if KIND == "reverse_kl":
        values = tl.where(tl.abs(r) < 0.25, q * _excess(r), q * (r - 1.0) + p)
        gradient = q * (gap - gap_sum / student_sum)  # r − KL, without the error of the normalisers
    elif KIND == "forward_kl":
        near = tl.abs(r) < 0.25
        values = tl.where(near, p * _excess(-r), q - p * (r + 1.0))
        gradient = tl.where(near, q * (r - _excess(r)), q - p)
    else:
        student_share, teacher_share = _log_shares(r, beta)
        values = beta * p * teacher_share + (1.0 - beta) * q * student_share
        values = tl.where(tl.abs(r) < 0.0625, q * _mixture_excess(r, beta), values)
        share = tl.sum(q * student_share, 0)
        if WITH_GRADIENT and PARTS > 1:
            tl.store(partial_ptr + 5 * PARTS + part, share)
            _meet(arrivals_ptr, 2 * PARTS)
            share_P = tl.load(partial_ptr + 5 * PARTS + parts, mask=parts < PARTS, other=0.0, cache_modifier=".cg")
            share = tl.sum(share_P, 0)
        gradient = (1.0 - beta) * q * (student_share - share)
    tl.store(value_ptr + tl.program_id(0), tl.sum(values, 0))
    if WITH_GRADIENT:
        gradient = (gradient * slope).to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + place + word, gradient, mask=word < stride)

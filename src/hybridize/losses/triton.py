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

_BLOCK_WORDS = 4096
_NUM_WARPS = 16
_BLOCK_ELEMENTS = 8192  # of what is scaled
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
    student_bias_V, teacher_bias_V = (
        None if bias is None else bias.float().contiguous() for bias in (student_bias_V, teacher_bias_V)
    )
    num_rows, num_words = student_logits_CV.shape
    stride = student_logits_CV.stride(0)
    for rows in (student_logits_CV, teacher_logits_CV, gradient_CV):
        assert rows is None or (rows.shape == (num_rows, num_words) and rows.stride() == (stride, 1))
    assert stride % ROW_ALIGNMENT == 0
    block = min(_BLOCK_WORDS, triton.next_power_of_2(num_words))
    values_C = student_logits_CV.new_empty(num_rows)
    with torch.cuda.device_of(values_C):
        _divergence_kernel[(num_rows,)](
            student_logits_CV,
            teacher_logits_CV,
            student_bias_V,
            teacher_bias_V,
            values_C,
            gradient_CV,
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
            BLOCK=block,
            num_warps=max(1, _NUM_WARPS * block // _BLOCK_WORDS),
        )
    return values_C.sum()


def scale(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor in place by a scalar on the same device, in float32; by 1, without touching it."""
    if tensor.numel():
        grid = (triton.cdiv(tensor.numel(), _BLOCK_ELEMENTS),)
        with torch.cuda.device_of(tensor):
            _scale_kernel[grid](tensor, factor, tensor.numel(), BLOCK=_BLOCK_ELEMENTS, num_warps=8)


@triton.jit
def _scale_kernel(tensor_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(tensor_ptr + place, mask=place < numel)
        tl.store(tensor_ptr + place, (x.to(tl.float32) * factor).to(tensor_ptr.dtype.element_ty), mask=place < numel)


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
def _fold(x, top, total):
    """Take x into a running sum of exponentials: one exponential is the factor of the old sum or that of x."""
    e = tl.exp(-tl.abs(x - top))
    above = x > top
    old, new = tl.where(above, e, 1.0), tl.where(above, 1.0, e)
    return tl.where(above, x, top), total * old + new, old, new


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
def _divergence_kernel(
    student_ptr,
    teacher_ptr,
    student_bias_ptr,
    teacher_bias_ptr,
    value_ptr,
    gradient_ptr,
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
    BLOCK: tl.constexpr,
):
    """See the module's docstring; every lane keeps sums of its own, which meet at the end of a reading."""
    row = tl.program_id(0)
    student_ptr += row.to(tl.int64) * stride
    teacher_ptr += row.to(tl.int64) * stride
    lane = tl.arange(0, BLOCK)
    num_blocks = tl.cdiv(num_words, BLOCK)

    student_top = tl.full((BLOCK,), -1e30, tl.float32)
    teacher_top = tl.full((BLOCK,), -1e30, tl.float32)
    student_sum = tl.zeros((BLOCK,), tl.float32)
    teacher_sum = tl.zeros((BLOCK,), tl.float32)
    gap_sum = tl.zeros((BLOCK,), tl.float32)
    for block in range(num_blocks):
        word = block * BLOCK + lane
        s, _ = _tempered(
            student_ptr, student_bias_ptr, word, stride, num_words,
            student_scale, student_cap, inverse_temperature, STUDENT_BIAS, STUDENT_CAP,
        )  # fmt: skip
        t, _ = _tempered(
            teacher_ptr, teacher_bias_ptr, word, stride, num_words,
            teacher_scale, teacher_cap, inverse_temperature, TEACHER_BIAS, TEACHER_CAP,
        )  # fmt: skip
        student_top, student_sum, old, new = _fold(s, student_top, student_sum)
        teacher_top, teacher_sum, _, _ = _fold(t, teacher_top, teacher_sum)
        if KIND == "reverse_kl":
            gap_sum = gap_sum * old + new * tl.where(word < num_words, s - t, 0.0)
    student_max = tl.max(student_top, 0)
    teacher_max = tl.max(teacher_top, 0)
    rescale = tl.exp(student_top - student_max)
    student_total = tl.sum(student_sum * rescale, 0)
    teacher_total = tl.sum(teacher_sum * tl.exp(teacher_top - teacher_max), 0)
    mean_gap = tl.sum(gap_sum * rescale, 0) / student_total  # E_q d
    shift = (student_max - teacher_max) + tl.log(student_total / teacher_total)  # log(Z_q / Z_p)
    student_factor = 1.0 / student_total
    teacher_factor = 1.0 / teacher_total

    mean_share = 0.0  # E_q log(q/m)
    if KIND == "jsd" and WITH_GRADIENT:
        shares = tl.zeros((BLOCK,), tl.float32)
        for step in range(num_blocks):
            word = (num_blocks - 1 - step) * BLOCK + lane
            s, _ = _tempered(
                student_ptr, student_bias_ptr, word, stride, num_words,
                student_scale, student_cap, inverse_temperature, STUDENT_BIAS, STUDENT_CAP,
            )  # fmt: skip
            t, _ = _tempered(
                teacher_ptr, teacher_bias_ptr, word, stride, num_words,
                teacher_scale, teacher_cap, inverse_temperature, TEACHER_BIAS, TEACHER_CAP,
            )  # fmt: skip
            r = tl.where(word < num_words, (s - t) - shift, 0.0)
            student_share, _ = _log_shares(r, beta)
            shares += tl.exp(s - student_max) * student_share
        mean_share = tl.sum(shares, 0) * student_factor

    values = tl.zeros((BLOCK,), tl.float32)
    for step in range(num_blocks):
        # After an even number of readings the end of the row is what was read last, after an odd one the beginning.
        block = step if KIND == "jsd" and WITH_GRADIENT else num_blocks - 1 - step
        word = block * BLOCK + lane
        s, slope = _tempered(
            student_ptr, student_bias_ptr, word, stride, num_words,
            student_scale, student_cap, inverse_temperature, STUDENT_BIAS, STUDENT_CAP,
        )  # fmt: skip
        t, _ = _tempered(
            teacher_ptr, teacher_bias_ptr, word, stride, num_words,
            teacher_scale, teacher_cap, inverse_temperature, TEACHER_BIAS, TEACHER_CAP,
        )  # fmt: skip
        gap = tl.where(word < num_words, s - t, 0.0)
        r = tl.where(word < num_words, gap - shift, 0.0)
        q = tl.exp(s - student_max) * student_factor
        p = tl.exp(t - teacher_max) * teacher_factor
        near = tl.abs(r) < 0.25
        if KIND == "reverse_kl":
            values += tl.where(near, q * _excess(r), q * (r - 1.0) + p)
            gradient = q * (gap - mean_gap)
        elif KIND == "forward_kl":
            values += tl.where(near, p * _excess(-r), q - p * (r + 1.0))
            gradient = tl.where(near, q * (r - _excess(r)), q - p)
        else:
            student_share, teacher_share = _log_shares(r, beta)
            value = beta * p * teacher_share + (1.0 - beta) * q * student_share
            values += tl.where(tl.abs(r) < 0.0625, q * _mixture_excess(r, beta), value)
            gradient = (1.0 - beta) * q * (student_share - mean_share)
        if WITH_GRADIENT:
            place = gradient_ptr + row.to(tl.int64) * stride + word
            tl.store(place, (gradient * slope).to(gradient_ptr.dtype.element_ty), mask=word < stride)
    tl.store(value_ptr + row, tl.sum(values, 0))

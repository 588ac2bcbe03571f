"""The chunked divergence is the dense one: values, gradients, masks, micro-batches, memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hybridize.losses import KINDS, dense_divergence, linear_divergence


def make(num_tokens=23, student_width=5, teacher_width=7, vocabulary=31, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "student_hidden_TE": draw(num_tokens, student_width).requires_grad_(),
        "student_head_VE": draw(vocabulary, student_width).requires_grad_(),
        "teacher_hidden_TF": draw(num_tokens, teacher_width).requires_grad_(),
        "teacher_head_VF": draw(vocabulary, teacher_width).requires_grad_(),
        "student_bias_V": draw(vocabulary).requires_grad_(),
        "teacher_bias_V": draw(vocabulary).requires_grad_(),
    }


def dense(inputs, *args, **options):
    student = inputs["student_hidden_TE"] @ inputs["student_head_VE"].t()
    teacher = inputs["teacher_hidden_TF"] @ inputs["teacher_head_VF"].t()
    if "student_bias_V" in inputs:
        student = student + inputs["student_bias_V"]
        teacher = teacher + inputs["teacher_bias_V"]
    return dense_divergence(student, teacher, *args, **options)


def student_tensors(inputs):
    return [tensor for name, tensor in inputs.items() if name.startswith("student")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_tokens", "chunk_tokens", "temperature", "beta"),
    [(1, 4, 1.0, 0.5), (23, 4, 1.0, 0.5), (23, 23, 2.5, 0.3), (64, 63, 0.7, 0.9), (63, 1000, 1.0, 0.1)],
)
def test_chunked_divergence_equals_the_dense_formula_with_gradients(kind, num_tokens, chunk_tokens, temperature, beta):
    inputs = make(num_tokens)
    options = {"kind": kind, "temperature": temperature, "beta": beta}
    value = linear_divergence(**inputs, **options, chunk_tokens=chunk_tokens)
    expected = dense(inputs, **options)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    gradients = torch.autograd.grad(3 * value, student_tensors(inputs))
    expected_gradients = torch.autograd.grad(3 * expected, student_tensors(inputs))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_only_the_student(kind):
    inputs = make()
    linear_divergence(**inputs, kind=kind).backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == name.startswith("student"), name


@pytest.mark.parametrize("frozen", ["student_hidden_TE", "student_head_VE", "student_bias_V"])
def test_a_frozen_part_leaves_the_other_gradients_unchanged(frozen):
    inputs = make()
    full = torch.autograd.grad(linear_divergence(**inputs), student_tensors(inputs))
    inputs[frozen].requires_grad_(False)
    linear_divergence(**inputs, chunk_tokens=10).backward()
    for tensor, expected in zip(student_tensors(inputs), full, strict=True):
        if tensor is inputs[frozen]:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected)


def test_without_gradients_the_value_is_the_same_for_half_the_products():
    inputs = make()
    with torch.no_grad(), FlopCounterMode(display=False) as without:
        value = linear_divergence(**inputs, kind="jsd")
    assert not value.requires_grad
    assert without.get_total_flops() == 2 * 23 * 31 * (5 + 7)
    torch.testing.assert_close(value, linear_divergence(**inputs, kind="jsd").detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_to_itself_is_zero_and_otherwise_above(kind):
    inputs = make()
    same = {
        "student_hidden_TE": inputs["student_hidden_TE"],
        "student_head_VE": inputs["student_head_VE"],
        "teacher_hidden_TF": inputs["student_hidden_TE"],
        "teacher_head_VF": inputs["student_head_VE"],
    }
    value = linear_divergence(**same, kind=kind)
    assert abs(value.item()) < 1e-14
    gradient = torch.autograd.grad(value, inputs["student_head_VE"])[0]
    assert gradient.abs().max() < 1e-14
    assert linear_divergence(**inputs, kind=kind).item() > 0.1


def test_reverse_kl_is_student_to_teacher_in_nat():
    q, p = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    reverse = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    logits = torch.stack([q.log(), torch.tensor([0.8, 0.1, 0.1]).log()])
    other = torch.stack([p.log(), torch.tensor([0.3, 0.3, 0.4]).log()])
    assert dense_divergence(logits[:1], other[:1], "reverse_kl").item() == pytest.approx(reverse, abs=1e-6)
    forward = sum(b * math.log(b / a) for a, b in zip([0.8, 0.1, 0.1], [0.3, 0.3, 0.4], strict=True))
    assert dense_divergence(logits[1:], other[1:], "forward_kl").item() == pytest.approx(forward, abs=1e-6)


def test_reverse_kl_gradient_is_the_published_one():
    inputs = make(num_tokens=9)
    head = torch.eye(31, dtype=torch.float64)
    logits = (inputs["student_hidden_TE"] @ inputs["student_head_VE"].t()).detach().requires_grad_()
    teacher_logits = inputs["teacher_hidden_TF"].detach() @ inputs["teacher_head_VF"].detach().t()
    linear_divergence(logits, head, teacher_logits, head, reduction="sum").backward()
    q, p = logits.detach().softmax(-1), teacher_logits.softmax(-1)
    ratio = (q / p).log()
    expected = q * (ratio - (q * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_is_not_computed(kind):
    inputs = make()
    expected = linear_divergence(**inputs, kind=kind)
    expected_gradients = torch.autograd.grad(expected, student_tensors(inputs))

    positions = torch.tensor(sorted(torch.randperm(40, generator=torch.Generator().manual_seed(1))[:23].tolist()))
    valid = torch.zeros(40, dtype=torch.bool)
    valid[positions] = True
    padded = dict(inputs)
    for name in ("student_hidden_TE", "teacher_hidden_TF"):
        rows = torch.full((40, inputs[name].shape[1]), math.nan, dtype=torch.float64)
        rows[positions] = inputs[name].detach()
        padded[name] = rows.requires_grad_()
    value = linear_divergence(**padded, kind=kind, valid_T=valid, chunk_tokens=7)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    gradients = list(torch.autograd.grad(value, student_tensors(padded)))
    assert (gradients[0][~valid] == 0).all()
    gradients[0] = gradients[0][valid]
    torch.testing.assert_close(gradients, list(expected_gradients), rtol=1e-11, atol=1e-14)


def test_dense_mask_equals_the_chunked_mask():
    inputs = make()
    valid = torch.arange(23) % 3 != 1
    torch.testing.assert_close(
        linear_divergence(**inputs, valid_T=valid), dense(inputs, valid_T=valid), rtol=1e-12, atol=0
    )


def test_micro_batches_of_sums_make_the_mean_of_the_batch():
    inputs = make()
    valid = torch.arange(23) % 4 != 0
    whole = linear_divergence(**inputs, valid_T=valid)
    whole_gradients = torch.autograd.grad(whole, student_tensors(inputs))
    total = 0.0
    for rows in (slice(0, 3), slice(3, 17), slice(17, 23)):
        part = dict(inputs)
        for name in ("student_hidden_TE", "teacher_hidden_TF"):
            part[name] = inputs[name][rows]
        loss = linear_divergence(**part, valid_T=valid[rows], reduction="sum") / valid.sum()
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-13)
    for tensor, expected in zip(student_tensors(inputs), whole_gradients, strict=True):
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_valid_token_gives_zero_with_a_graph(reduction):
    inputs = make()
    value = linear_divergence(**inputs, valid_T=torch.zeros(23, dtype=torch.bool), reduction=reduction)
    assert value.item() == 0.0
    value.backward()
    for tensor in student_tensors(inputs):
        assert (tensor.grad == 0).all()
    assert dense(inputs, valid_T=torch.zeros(23, dtype=torch.bool)).item() == 0.0


def test_jsd_is_symmetric_at_one_half_and_at_most_log_two():
    inputs = make()
    forth = linear_divergence(**inputs, kind="jsd")
    swapped = {
        ("teacher" if name.startswith("student") else "student") + name[7:-2] + suffix: tensor
        for name, tensor in inputs.items()
        for suffix in [{"TE": "TF", "TF": "TE", "VE": "VF", "VF": "VE", "_V": "_V"}[name[-2:]]]
    }
    torch.testing.assert_close(linear_divergence(**swapped, kind="jsd"), forth, rtol=1e-12, atol=0)
    far = {name: tensor.detach() * 30 for name, tensor in inputs.items()}
    assert 0.6 < linear_divergence(**far, kind="jsd").item() <= math.log(2) + 1e-12


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns, backward included."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_exceeds_one_chunk_of_logits(kind):
    num_tokens, chunk, vocabulary = 200, 16, 101
    inputs = make(num_tokens, vocabulary=vocabulary, dtype=torch.float32)
    with LargestTensor() as chunked:
        linear_divergence(**inputs, kind=kind, chunk_tokens=chunk, valid_T=torch.arange(num_tokens) > 3).backward()
    assert chunked.numel == chunk * vocabulary
    with LargestTensor() as whole:
        dense(inputs, kind=kind).backward()
    assert whole.numel == num_tokens * vocabulary


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_are_judged_in_float32(kind, autocast):
    inputs = make(num_tokens=37, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = linear_divergence(**inputs, kind=kind, chunk_tokens=8)
    assert value.dtype == torch.float32
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expected = dense(wide, kind=kind)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(value, student_tensors(inputs))
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, student_tensors(wide)), strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), exact, rtol=8e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_agrees_with_the_dense_formula(kind, dtype):
    inputs = make(num_tokens=200, student_width=64, teacher_width=128, vocabulary=1003, dtype=dtype)
    inputs = {name: (0.3 * tensor.detach()).cuda().requires_grad_() for name, tensor in inputs.items()}
    value = linear_divergence(**inputs, kind=kind, chunk_tokens=64)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expected = dense(wide, kind=kind)
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    gradients = torch.autograd.grad(value, student_tensors(inputs))
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, student_tensors(wide)), strict=True):
        error = (gradient.double() - exact).norm() / exact.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "reversed"}, "kind: 'reversed' is unknown; use one of reverse_kl, forward_kl, jsd"),
        ({"kind": "jsd", "beta": 1.0}, "beta: 1.0 is outside"),
        ({"temperature": 0.0}, "temperature: 0.0 must be above 0"),
        ({"reduction": "batchmean"}, "reduction: 'batchmean' is unknown"),
        ({"chunk_tokens": 0}, "chunk_tokens: 0 must be at least 1"),
        ({"valid_T": torch.ones(23)}, "valid_T: needs bool"),
        ({"valid_T": torch.ones(22, dtype=torch.bool)}, "valid_T: needs bool"),
        ({"teacher_head_VF": torch.ones(30, 7)}, "teacher: bias"),
        ({"teacher_head_VF": torch.ones(30, 7), "teacher_bias_V": None}, "both must agree"),
        ({"student_hidden_TE": torch.ones(1, 23, 5)}, "student: hidden states"),
    ],
)
def test_wrong_input_is_named_in_the_error(change, message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**make(), **change})


def test_dense_shapes_must_agree():
    with pytest.raises(ValueError, match="they must have one shape"):
        dense_divergence(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", [((0.25, None), (2.0, None)), ((1.5, 3.0), (1.0, None)), ((1.0, None), (0.5, 2.0))])
def test_scaled_and_capped_logits_are_those_of_the_dense_formula(kind, rules):
    torch.manual_seed(3)

    def shaped(logits, rule):
        scale, softcap = rule
        return scale * logits if softcap is None else softcap * torch.tanh(scale * logits / softcap)

    hidden, head, bias = (torch.randn(*size, dtype=torch.float64) for size in ((9, 6), (11, 6), (11,)))
    teacher_hidden, teacher_head = torch.randn(9, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    for tensor in (hidden, head, bias):
        tensor.requires_grad_(True)
    options = {"kind": kind, "temperature": 1.7}
    ours = linear_divergence(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        student_bias_V=bias,
        student_rule=rules[0],
        teacher_rule=rules[1],
        chunk_tokens=4,
        **options,
    )
    gradients = torch.autograd.grad(ours, (hidden, head, bias))
    student, teacher = shaped(hidden @ head.t() + bias, rules[0]), shaped(teacher_hidden @ teacher_head.t(), rules[1])
    dense = dense_divergence(student, teacher, **options)
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(gradients, torch.autograd.grad(dense, (hidden, head, bias)))


def test_a_rule_out_of_range_is_named():
    args = [torch.zeros(2, 3), torch.zeros(4, 3)] * 2
    with pytest.raises(ValueError, match=r"student_rule: scale 0\.0 and softcap None must be above 0"):
        linear_divergence(*args, student_rule=(0.0, None))

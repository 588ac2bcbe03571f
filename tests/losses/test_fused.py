"""The GPU's plan of the divergence: its spans and chunks, its operator, and on a GPU its kernel against float64."""

import math
import os
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hybridize.losses import KINDS, chunked, dense_divergence, fused, linear, linear_divergence

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
gpu = (pytest.mark.gpu, on_gpu)
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None, reason="needs TRITON_INTERPRET=1"
)
RULES = [((1.0, None), (1.0, None)), ((1.5, 3.0), (0.5, None)), ((0.7, None), (1.2, 4.0))]


def make(num_tokens, vocabulary, dtype, *, device="cpu", head_dtype=None, distance=1.0, seed=0):
    """Inputs whose divergence grows with `distance`; the student's three want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, head, bias = draw(num_tokens, 64), draw(vocabulary, 64) / 4, draw(vocabulary)
    inputs = {
        "student_hidden_TE": hidden.to(dtype),
        "student_head_VE": head.to(head_dtype or dtype),
        "teacher_hidden_TF": (hidden + distance * draw(num_tokens, 64)).to(dtype),
        "teacher_head_VF": (head + distance * draw(vocabulary, 64) / 4).to(dtype),
        "student_bias_V": bias.to(head_dtype or dtype),
        "teacher_bias_V": (bias + distance * draw(vocabulary)).to(dtype),
    }
    return {name: tensor.to(device).requires_grad_(name.startswith("student")) for name, tensor in inputs.items()}


def exact(inputs, kind, student_rule=(1.0, None), teacher_rule=(1.0, None), valid_T=None, **options):
    """Value and gradients of the dense formula in float64."""
    wide = {name: tensor.detach().double() for name, tensor in inputs.items()}
    student = [wide[name].requires_grad_() for name in wide if name.startswith("student")]

    def logits(hidden, head, bias, rule):
        logits = rule[0] * (hidden @ head.t() + bias)
        return logits if rule[1] is None else rule[1] * torch.tanh(logits / rule[1])

    value = dense_divergence(
        logits(*student, student_rule),
        logits(wide["teacher_hidden_TF"], wide["teacher_head_VF"], wide["teacher_bias_V"], teacher_rule),
        kind,
        valid_T=valid_T,
        **options,
    )
    return value, torch.autograd.grad(value, student)


def ours(inputs, kind, factor=1.0, **options):
    value = factor * linear_divergence(**inputs, kind=kind, **options)
    return value, torch.autograd.grad(value, [tensor for tensor in inputs.values() if tensor.requires_grad])


def errors(gradients, expected):
    return [
        ((ours.double() - truth).norm() / truth.norm()).item() for ours, truth in zip(gradients, expected, strict=True)
    ]


def torch_rows(
    logits, teacher_logits, gradient, *, student_bias_V, teacher_bias_V, student_rule, teacher_rule, **options
):
    """What the kernel does to a chunk's logits, as the plain form does it."""
    assert (student_rule, teacher_rule) == ((1.0, None), (1.0, None))
    assert logits.stride() == teacher_logits.stride() == (64 * math.ceil(logits.shape[1] / 64), 1)
    temperature = options.pop("temperature")
    log_q = ((logits.double() + student_bias_V) / temperature).log_softmax(-1)
    log_p = ((teacher_logits.double() + teacher_bias_V) / temperature).log_softmax(-1)
    values, slope = chunked._value_and_gradient(log_q, log_p, **options, with_gradient=True)
    if gradient is not None:
        gradient.copy_(slope / temperature)
    return values.sum().float()


@pytest.fixture
def on_cpu(monkeypatch):
    """The fused plan on a CPU, with a kernel in torch; the list of the calls' (rows, with a gradient)."""
    calls = []

    def rows(logits, teacher_logits, gradient, **options):
        calls.append((len(logits), gradient is not None))
        return torch_rows(logits, teacher_logits, gradient, **options)

    kernel = SimpleNamespace(divergence_rows=rows, ROW_ALIGNMENT=64)
    monkeypatch.setitem(sys.modules, "hybridize.losses.triton", kernel)
    monkeypatch.setattr(linear, "can_fuse", lambda *tensors: True)
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tokens", "chunk_tokens"), [(1, None), (300, None), (300, 63), (300, 256), (900, 150)])
def test_the_plan_makes_every_gradient_of_the_dense_formula(on_cpu, kind, num_tokens, chunk_tokens):
    inputs = make(num_tokens, 31, torch.float32)
    value, gradients = ours(inputs, kind, 3.0, temperature=1.7, beta=0.3, chunk_tokens=chunk_tokens)
    expected, truth = exact(inputs, kind, temperature=1.7, beta=0.3)
    assert value.item() == pytest.approx(3 * expected.item(), rel=1e-6)
    assert max(errors(gradients, [3 * gradient for gradient in truth])) < 2e-6
    assert sum(rows for rows, _ in on_cpu) == num_tokens
    assert all(with_gradient for _, with_gradient in on_cpu)


@pytest.mark.parametrize("frozen", ["student_hidden_TE", "student_head_VE", "student_bias_V"])
def test_the_plan_leaves_out_a_frozen_part_only(on_cpu, frozen):
    inputs = make(40, 31, torch.float32)
    _, full = ours(inputs, "jsd")
    order = [name for name, tensor in inputs.items() if tensor.requires_grad]
    inputs[frozen].requires_grad_(False)
    _, rest = ours(inputs, "jsd")
    torch.testing.assert_close(rest, tuple(g for name, g in zip(order, full, strict=True) if name != frozen))
    with torch.no_grad():
        on_cpu.clear()
        linear_divergence(**inputs)
    assert on_cpu == [(40, False)]


def test_the_plan_without_tokens_gives_zeros(on_cpu):
    inputs = make(20, 31, torch.float32)
    value, gradients = ours(inputs, "reverse_kl", valid_T=torch.zeros(20, dtype=torch.bool))
    assert value.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients)
    assert on_cpu == []


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 4096, 5000, 16384, 100_001])
@pytest.mark.parametrize("row_bytes", [64, 64000, 262144, 2**31])
def test_spans_fit_their_memory_and_are_as_equal_as_tiles_allow(num_tokens, row_bytes):
    span, chunk = fused._sizes(num_tokens, row_bytes, None)
    num_spans = math.ceil(num_tokens / span)
    assert span * row_bytes <= max(2**30, 128 * row_bytes)
    assert num_spans == math.ceil(num_tokens / max(128, 2**30 // row_bytes))
    assert span - math.ceil(num_tokens / num_spans) < 128
    assert 0 < chunk <= span
    assert chunk <= max(128, span / 8 + 128)


def test_spans_are_never_longer_than_asked_for():
    assert fused._sizes(16384, 262144, None) == (4096, 512)
    assert fused._sizes(16384, 262144, 1000) == (1000, 128)
    assert fused._sizes(10, 262144, 4) == (4, 4)


def test_float64_and_a_cpu_take_the_plain_form():
    for dtype in (torch.float32, torch.float64):
        tensors = [torch.zeros(2, 2, dtype=dtype)] * 4
        assert not fused.can_fuse(*tensors)


def test_the_operator_knows_the_shapes_of_its_results():
    with FakeTensorMode():
        hidden, head, bias = torch.empty(9, 4, dtype=torch.bfloat16), torch.empty(31, 4), torch.empty(31)
        args = [None, 1.0, None, 1.0, None, "jsd", 0.5, 1.0, None, torch.bfloat16, torch.bfloat16]
        total, *gradients = torch.ops.hybridize.linear_divergence(
            hidden, head, bias, hidden, head, *args, True, True, False
        )
    assert (total.shape, total.dtype) == ((), torch.float32)
    assert [tuple(gradient.shape) for gradient in gradients] == [(9, 4), (31, 4), (0,)]
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("plan", ["plain", "fused"])
def test_a_kept_graph_gives_the_same_gradients_again(plan, request):
    if plan == "fused":
        request.getfixturevalue("on_cpu")
    inputs = make(20, 31, torch.float32)
    student = [tensor for tensor in inputs.values() if tensor.requires_grad]
    value = linear_divergence(**inputs)
    first = torch.autograd.grad(value, student, torch.tensor(3.0), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(value, student, torch.tensor(3.0), retain_graph=True)
    last = torch.autograd.grad(value, student, torch.tensor(3.0))
    torch.testing.assert_close(list(first), kept, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, last, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.filterwarnings("ignore")
def test_compiled_and_checkpointed_losses_are_the_eager_one(device, on_cpu, monkeypatch):
    if device == "cuda":
        monkeypatch.undo()
    inputs = make(200, 70, torch.float32, device=device)
    student = [tensor for tensor in inputs.values() if tensor.requires_grad]

    def loss(*tensors):
        return linear_divergence(*tensors[:4], student_bias_V=tensors[4], teacher_bias_V=tensors[5], chunk_tokens=64)

    expected = torch.autograd.grad(loss(*inputs.values()), student)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs.values())
    torch.testing.assert_close(torch.autograd.grad(compiled, student), expected, rtol=0, atol=0)
    again = checkpoint(loss, *inputs.values(), use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, student), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float32, marks=interpreted),
        pytest.param("cuda", torch.float32, marks=gpu),
        pytest.param("cuda", torch.bfloat16, marks=gpu),
    ],
)
def test_scaling_in_place_multiplies_in_float32(device, dtype):
    from hybridize.losses.triton import scale

    tensor = torch.randn(9001, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for factor in (1.0, 0.123456, 0.0):
        expected = (tensor.float() * factor).to(dtype)
        scale(tensor, torch.tensor(factor, device=device))
        assert torch.equal(tensor, expected)


@interpreted
@pytest.mark.filterwarnings("ignore")
def test_the_kernel_agrees_in_triton_s_interpreter():
    """Run with TRITON_INTERPRET=1 where there is Triton but no GPU."""
    for kind in KINDS:
        for rules in RULES:
            check_kernel(kind, 3, 77, rules, torch.float32, "cpu")
        check_kernel(kind, 2, 4200, RULES[1], torch.float32, "cpu")
        check_kernel(kind, 2, 4200, RULES[0], torch.float32, "cpu", distance=3e-3)


def check_kernel(kind, num_rows, vocabulary, rules, dtype, device, distance=1.0):
    from hybridize.losses.triton import divergence_rows

    head = make(num_rows, vocabulary, torch.float32, device=device, distance=distance)
    stride = 64 * math.ceil(vocabulary / 64)
    student, teacher = (torch.full((num_rows, stride), math.nan, device=device)[:, :vocabulary] for _ in range(2))
    gradient = torch.full((num_rows, stride), math.nan, device=device, dtype=dtype)[:, :vocabulary]
    student.copy_((head["student_hidden_TE"] @ head["student_head_VE"].t()).detach())
    teacher.copy_(head["teacher_hidden_TF"] @ head["teacher_head_VF"].t())
    identity = torch.eye(vocabulary, device=device, dtype=torch.float64)
    options = {"temperature": 1.7, "beta": 0.3}
    biases = {name: head[name].detach() for name in ("student_bias_V", "teacher_bias_V")}
    expected, (truth, _, _) = exact(
        {
            "student_hidden_TE": student,
            "student_head_VE": identity,
            "teacher_hidden_TF": teacher,
            "teacher_head_VF": identity,
            **biases,
        },
        kind,
        *rules,
        **options,
        reduction="sum",
    )
    total = divergence_rows(
        student, teacher, gradient, **biases, student_rule=rules[0], teacher_rule=rules[1], kind=kind, **options
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-5 if distance == 1.0 else 2e-3)
    assert errors([gradient], [truth])[0] < (2e-6 if dtype == torch.float32 else 3e-3) / min(1.0, distance)
    if vocabulary < 10_000:
        rest = {"student_rule": rules[0], "teacher_rule": rules[1], "kind": kind, **options}
        assert divergence_rows(student, teacher, None, **biases, **rest).item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_rows", "vocabulary", "rules"),
    [(1, 31, RULES[0]), (63, 4096, RULES[1]), (40, 4097, RULES[2]), (3, 20_000, RULES[1])],
)
def test_gpu_kernel_agrees_with_float64(kind, num_rows, vocabulary, rules):
    check_kernel(kind, num_rows, vocabulary, rules, torch.float32, "cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_kernel_keeps_the_digits_of_a_small_divergence(kind):
    check_kernel(kind, 30, 5000, RULES[0], torch.float32, "cuda", distance=3e-3)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_tokens", "vocabulary", "chunk", "dtype"),
    [
        (1, 37, None, torch.bfloat16),
        (63, 5000, 20, torch.float16),
        (63, 5000, 20, torch.float32),
        (1000, 32_003, 512, torch.bfloat16),
    ],
)
def test_gpu_divergence_agrees_with_float64_with_gradients(kind, num_tokens, vocabulary, chunk, dtype):
    inputs = make(num_tokens, vocabulary, dtype, device="cuda")
    valid = torch.arange(num_tokens, device="cuda") % 5 != 3
    options = {"temperature": 1.3, "beta": 0.3, "valid_T": valid}
    rules = {"student_rule": RULES[1][0], "teacher_rule": RULES[1][1]}
    poison = torch.full((2**26,), math.nan, device="cuda")
    del poison  # what is allocated next holds it
    factor = 1.0 if dtype != torch.float16 else 256.0  # a loss is scaled up in float16
    value, gradients = ours(inputs, kind, factor, chunk_tokens=chunk, **options, **rules)
    expected, truth = exact(inputs, kind, **options, **rules)
    assert value.item() == pytest.approx(factor * expected.item(), rel=2e-4)
    assert (gradients[0][~valid] == 0).all()
    limit = 1e-4 if dtype == torch.float32 else 8e-3 if dtype == torch.bfloat16 else 2e-2
    assert max(errors([gradient / factor for gradient in gradients], truth)) < limit
    again, same = ours(inputs, kind, factor, chunk_tokens=chunk, **options, **rules)
    assert again.item() == value.item()
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


@pytest.mark.gpu
@on_gpu
def test_gpu_sums_a_float32_head_s_gradient_in_float32():
    inputs = make(2000, 3001, torch.bfloat16, device="cuda", head_dtype=torch.float32)
    inputs["student_head_VE"].data = inputs["student_head_VE"].data.bfloat16().float()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        _, gradients = ours(inputs, "reverse_kl", chunk_tokens=128)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    _, truth = exact(inputs, "reverse_kl")
    found = errors(gradients, truth)
    assert found[1] < 2.2e-3  # that of the gradient on the logits, whatever the number of spans
    half = make(2000, 3001, torch.bfloat16, device="cuda")
    few, many = (
        errors(ours(half, "reverse_kl", chunk_tokens=chunk)[1], exact(half, "reverse_kl")[1]) for chunk in (512, 128)
    )
    assert few[1] < 4e-3
    assert many[1] < 3e-3  # more than four spans are summed in float32 and rounded once


@pytest.mark.gpu
@on_gpu
def test_gpu_memory_is_that_of_a_span_and_the_gradients():
    num_tokens, vocabulary, chunk = 4096, 32_768, 512
    inputs = make(num_tokens, vocabulary, torch.bfloat16, device="cuda")
    ours(inputs, "reverse_kl", chunk_tokens=chunk)  # allocates the products' workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, gradients = ours(inputs, "reverse_kl", chunk_tokens=chunk)
    extra = torch.cuda.max_memory_allocated() - before
    of_gradients = sum(gradient.numel() * (2 + 4) for gradient in gradients)  # summed in float32, then rounded
    of_span = chunk * vocabulary * 2 + 128 * vocabulary * 4 * 2
    assert extra < 1.1 * (of_gradients + of_span)

"""The chunked delta rule: its parts, what it keeps for the backward pass, and that pass under autocast."""

import pytest
import torch
from delta_rule_inputs import OPS, assert_same, both_ops, make_inputs, run, weights_for
from torch import Tensor

from hybridize.ops.delta_rule import chunked
from hybridize.ops.gated_delta.chunked import decay_products


def test_decay_products_are_those_of_every_stretch_with_gradients() -> None:
    g = torch.randn(3, 16, dtype=torch.float64).abs().neg()
    g[1, 5] = -torch.inf
    g.requires_grad_()
    alpha = g.exp()
    between, since_start = decay_products(g)
    tokens = range(16)
    for i in tokens:
        torch.testing.assert_close(since_start[:, i], alpha[:, : i + 1].prod(dim=-1))
        for j in tokens:
            expected = alpha[:, j + 1 : i + 1].prod(dim=-1) if j <= i else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(between[:, i, j], expected)
    weights, more = torch.randn(3, 16, 16, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    naive = torch.stack([alpha[:, : i + 1].prod(dim=-1) for i in tokens], dim=-1).mul(more).sum()
    naive = naive + sum(
        (weights[:, i, j] * alpha[:, j + 1 : i + 1].prod(dim=-1)).sum() for i in tokens for j in range(i)
    )
    (expected,) = torch.autograd.grad(naive, g)
    (got,) = torch.autograd.grad((between * weights).sum() + (since_start * more).sum(), g)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_solving_reads_below_the_diagonal_only_and_has_exact_gradients() -> None:
    matrix = torch.randn(3, 8, 8, dtype=torch.float64, requires_grad=True)
    right = torch.randn(3, 8, 5, dtype=torch.float64, requires_grad=True)
    whole = torch.eye(8, dtype=torch.float64) + matrix.tril(-1)
    torch.testing.assert_close(whole @ chunked.solve_unit_lower(matrix, right), right)
    assert torch.autograd.gradcheck(chunked.solve_unit_lower, (matrix, right))


@pytest.mark.parametrize("total_width", [1, 3])
def test_states_pass_as_the_formula_says_with_exact_gradients(total_width: int) -> None:
    shapes = (4, 2, 5, 2), (4, 2, 5, 3), (4, 2, 5, 3), (4, 2, total_width), (2, 3, 2)
    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    before, written, state = chunked.pass_states(*inputs)
    free, bound, k_out, total, expected = inputs
    for n in range(4):
        torch.testing.assert_close(before[n], expected)
        torch.testing.assert_close(written[n], free[n] - bound[n] @ expected)
        expected = total[n].unsqueeze(-1) * expected + k_out[n].transpose(-1, -2) @ written[n]
    torch.testing.assert_close(state, expected)
    assert torch.autograd.gradcheck(chunked.pass_states, inputs)


@both_ops
def test_memory_kept_for_backward_grows_with_inputs_only_in_long_sequences(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept_numel(numel: int) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
            return tensor

        monkeypatch.setattr(chunked, "_SEGMENT_NUMEL", numel)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            OPS[op][0](**inputs, backend="chunked")
        return sum(kept.values())

    inputs = make_inputs(op, batch=1, length=2048, heads=2, groups=1, key_width=16, value_width=16, dtype=torch.float32)
    sizes = sum(tensor.numel() for tensor in inputs.values())
    assert kept_numel(256 * 2 * 16) < 2 * sizes
    assert kept_numel(1 << 30) > 5 * sizes


@both_ops
def test_the_backward_pass_may_run_under_autocast(op: str) -> None:
    inputs = make_inputs(op, length=70, documents=3, dtype=torch.float32)
    weights = weights_for(inputs)
    expected = run(op, inputs, "chunked", weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(op, inputs, "chunked", weights)
    # The products outside our own backward passes are in bf16 then.
    assert_same(got, expected, 3e-2)


def test_the_parts_keep_their_gradients_precision_under_autocast() -> None:
    g = -torch.rand(3, 16)
    matrix, right = torch.randn(3, 8, 8) / 8, torch.randn(3, 8, 5)
    shapes = (4, 2, 5, 2), (4, 2, 5, 3), (4, 2, 5, 3), (4, 2, 1), (2, 3, 2)
    states = [torch.randn(shape) / 2 for shape in shapes]
    for part, inputs in ((decay_products, [g]), (chunked.solve_unit_lower, [matrix, right]),
                         (chunked.pass_states, states)):  # fmt: skip
        inputs = [tensor.requires_grad_() for tensor in inputs]
        outputs = part(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.randn_like(output) for output in outputs]
        expected = torch.autograd.grad(outputs, inputs, weights, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = torch.autograd.grad(outputs, inputs, weights)
        for tensor, other in zip(got, expected, strict=True):
            assert torch.equal(tensor, other)

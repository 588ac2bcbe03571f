"""The ops with a delta rule by flash-linear-attention's kernels: how they are called, and on a GPU what they give."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from delta_rule_inputs import (
    LENGTHS,
    OPS,
    assert_same,
    both_ops,
    decay_name,
    make_inputs,
    run,
    weights_for,
)
from torch import Tensor

from hybridize.ops import gated_delta, kimi_delta
from hybridize.ops.delta_rule import fla_kernels


def kernel_of(op: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """What the package's kernels compute, by their own arguments: a key per query, rows of documents."""

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float,
        initial_state: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert output_final_state
        assert q.shape == k.shape
        assert q.shape[:3] == v.shape[:3] == beta.shape
        assert (g.dtype, beta.dtype) == (torch.float32, torch.float32)
        assert float(g.detach().min()) > -100  # what is stronger costs the kernels their digits
        assert initial_state is None or initial_state.dtype == torch.float32
        bounds, rows = [0, q.shape[1]], q.shape[0]
        if cu_seqlens is not None:
            assert (q.shape[0], int(cu_seqlens[-1])) == (1, q.shape[1])
            bounds, rows = cu_seqlens.tolist(), len(cu_seqlens) - 1
        assert initial_state is None or len(initial_state) == rows
        outputs, states = [], []
        for index, (begin, end) in enumerate(pairwise(bounds)):
            state = initial_state if initial_state is None or cu_seqlens is None else initial_state[index : index + 1]
            document = (tensor[:, begin:end] for tensor in (q, k, v, g, beta))
            o, state = OPS[op][0](
                *document, scale=scale, initial_state_BHKV=state, return_final_state=True, backend="reference"
            )
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    return kernel


@both_ops
@pytest.mark.parametrize("documents", [1, 2, 9])
@pytest.mark.parametrize("with_state", [True, False])
def test_kernels_are_called_with_rows_of_documents(op: str, documents: int, with_state: bool) -> None:
    inputs = make_inputs(op, batch=3, length=30, dtype=torch.float32, documents=documents)
    if documents == 9:
        inputs["starts_BL"][0, 0] = True
        inputs["starts_BL"][1, -1] = True
    if not with_state:
        del inputs["initial_state_BHKV"]
    weights = weights_for(inputs)
    expected = run(op, inputs, "reference", weights)
    g = inputs[decay_name(op)]
    o_BLHV, state_BHKV = fla_kernels.call(
        kernel_of(op),
        *(inputs[name] for name in ("q_BLHK", "k_BLGK", "v_BLGV")),
        g,
        inputs["beta_BLH"],
        scale=6**-0.5,
        starts_BL=inputs.get("starts_BL"),
        initial_state_BHKV=inputs.get("initial_state_BHKV"),
    )
    value = (o_BLHV * weights[0]).sum() + (state_BHKV * weights[1]).sum()
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    grads = torch.autograd.grad(value, list(wanted.values()))
    assert_same({"o": o_BLHV, "state": state_BHKV, **dict(zip(wanted, grads, strict=True))}, expected, 1e-4)


@both_ops
@pytest.mark.parametrize("g", [-1e4, -1e30, -math.inf])
def test_kernels_get_no_decay_that_costs_them_their_digits(op: str, g: float) -> None:
    inputs = make_inputs(op, length=30, dtype=torch.float32)
    name = decay_name(op)
    ordinary = inputs[name].detach()
    inputs[name] = torch.where(torch.rand_like(ordinary) < 0.4, g, ordinary).requires_grad_()
    weights = weights_for(inputs)
    expected = run(op, inputs, "reference", weights)
    state = inputs.pop("initial_state_BHKV")
    o_BLHV, end_BHKV = fla_kernels.call(
        kernel_of(op), *inputs.values(), scale=6**-0.5, starts_BL=None, initial_state_BHKV=state
    )
    value = (o_BLHV * weights[0]).sum() + (end_BHKV * weights[1]).sum()
    grads = torch.autograd.grad(value, [*inputs.values(), state])
    names = [*inputs, "initial_state_BHKV"]
    assert_same({"o": o_BLHV, "state": end_BHKV, **dict(zip(names, grads, strict=True))}, expected, 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both_ops
@pytest.mark.parametrize("backend", ["chunked", "fla"])
@pytest.mark.parametrize("documents", [1, 20])
@pytest.mark.parametrize("length", LENGTHS)
def test_gpu_equals_reference_with_gradients(op: str, length: int, documents: int, backend: str) -> None:
    if backend == "fla" and not fla_kernels.is_installed():
        pytest.skip("needs flash-linear-attention")
    inputs = make_inputs(
        op, length=length, key_width=32, value_width=64, dtype=torch.bfloat16, documents=min(documents, length + 1)
    )
    weights = weights_for(inputs)
    exact = {
        name: tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    expected = run(op, exact, "chunked", (weights[0].double(), weights[1].double()))
    on_gpu = {name: tensor.detach().cuda() for name, tensor in inputs.items()}
    for name in ("g_BLH", "g_BLHK", "beta_BLH", "initial_state_BHKV"):
        if name in on_gpu:
            on_gpu[name] = on_gpu[name].float()
    on_gpu = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in on_gpu.items()}
    got = run(op, on_gpu, backend, (weights[0].cuda(), weights[1].cuda()))
    assert (got["o"].dtype, got["state"].dtype) == (torch.bfloat16, torch.float32)
    for name, tensor in expected.items():
        error = (got[name].cpu().double() - tensor).norm() / tensor.norm().clamp(min=1e-9)
        assert float(error) < 1.5e-2, f"{name}: relative error {float(error):.1e}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both_ops
def test_gpu_picks_the_kernels_and_steps_agree(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fla_kernels.is_installed():
        pytest.skip("needs flash-linear-attention")
    inputs = make_inputs(op, length=70, key_width=32, value_width=64, dtype=torch.bfloat16)
    inputs = {name: tensor.detach().cuda() for name, tensor in inputs.items()}
    inputs["initial_state_BHKV"] = inputs["initial_state_BHKV"].float()
    picked, _ = OPS[op][0](**inputs)
    assert torch.equal(picked, OPS[op][0](**inputs, backend="fla")[0])
    whole, end_BHKV = OPS[op][0](**inputs, return_final_state=True, backend="chunked")
    state_BHKV = inputs.pop("initial_state_BHKV")
    tokens = list(zip(*(tensor.unbind(1) for tensor in inputs.values()), strict=True))
    for use_kernel in (True, False):
        state, steps = state_BHKV, []
        if not use_kernel:
            for door in (gated_delta, kimi_delta):
                monkeypatch.setattr(door, "takes_kernel", lambda *args: False)
        for token in tokens:
            o_BHV, state = OPS[op][1](state, *token)
            steps.append(o_BHV)
        got = torch.stack(steps, dim=1)
        assert state.dtype == torch.float32
        assert float((got.double() - whole.double()).norm() / whole.double().norm()) < 1e-2
        assert float((state - end_BHKV).norm() / end_BHKV.norm()) < 1e-2

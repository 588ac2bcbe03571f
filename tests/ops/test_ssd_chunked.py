"""The chunked form of state space duality: its cuts, precision and gradients, what it keeps, how fast it is."""

from functools import partial

import pytest
import torch
from recurrence_checks import (
    assert_chunked_is_faster_than_the_loop,
    assert_gradients_are_right,
    assert_same,
    kept_numel,
)
from ssd_inputs import assert_chunked_is_reference, make_inputs, run, weights_for
from torch import Tensor

from hybridize.ops.ssd import chunks, ssd


@pytest.mark.parametrize(("chunk", "block_numel"), [(1, 1), (5, 1), (16, 4 * 2 * 6 * 256), (64, 1)], ids=str)
def test_chunked_does_not_depend_on_how_it_is_cut(
    chunk: int, block_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunks._CHUNK, "cpu", (chunk, chunk))
    monkeypatch.setitem(chunks._BLOCK_NUMEL, "cpu", block_numel)
    assert_chunked_is_reference(make_inputs(length=203, documents=4))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 3e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
    ids=["fp32", "bf16", "fp16"],
)
def test_chunked_equals_reference_in_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(length=1000, dtype=dtype, documents=3)
    weights = weights_for(inputs)
    got, truth = run(inputs, "chunked", weights), run(inputs, "reference", weights)
    assert got["y"].dtype == dtype
    assert got["state"].dtype == torch.float32
    assert_same(got, truth, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("dt", [-1e4, -30.0, 30.0, 1e4], ids=str)
@pytest.mark.parametrize("log_A", [-100.0, -30.0, 0.0, 12.0], ids=str)
def test_extreme_step_sizes_and_decays_stay_exact(dt: float, log_A: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(length=150, documents=3, dtype=dtype)
    extreme = {
        "dt_BLH": torch.where(torch.rand(2, 150, 6) < 0.3, dt, inputs["dt_BLH"].detach()).to(dtype),
        "A_H": torch.where(torch.rand(6) < 0.5, -torch.tensor(log_A).exp(), inputs["A_H"].detach()).to(dtype),
    }
    inputs |= {name: tensor.requires_grad_() for name, tensor in extreme.items()}
    assert_chunked_is_reference(inputs, 1e-11 if dtype == torch.float64 else 1e-4)


def test_a_long_fast_decay_keeps_its_digits_in_fp32() -> None:
    # The logarithms' sum falls to thousands within a chunk; what one token hands the next must not feel it.
    inputs = make_inputs(batch=1, length=64, dtype=torch.float32)
    step = torch.where(torch.arange(64)[:, None] % 2 == 0, 150.0, 1e-3).expand(1, 64, 6)
    fast = {
        **{name: inputs[name] for name in ("x_BLGP", "B_BLGN", "C_BLHN")},
        "dt_BLH": step.clone().requires_grad_(),
        "A_H": -torch.ones(6, requires_grad=True),
        "dt_softplus": False,
    }
    got, _ = ssd(**fast, backend="chunked")
    exact = {name: value.detach().double() if isinstance(value, Tensor) else value for name, value in fast.items()}
    expected, _ = ssd(**exact, backend="reference")
    odd = slice(1, None, 2)  # after a token of step 1e-3, little was forgotten
    torch.testing.assert_close(got[:, odd].double(), expected[:, odd], rtol=1e-5, atol=2e-4)


def test_gradcheck_of_every_input() -> None:
    inputs = make_inputs(batch=1, length=70, heads=2, groups=1, width=2, states=1, documents=3)
    assert_gradients_are_right(partial(ssd, backend="chunked"), inputs)


@pytest.mark.parametrize("name", ["x_BLGP", "A_H", "D_H", "C_BLHN", "initial_state_BHPN"])
def test_gradient_of_one_input_alone(name: str) -> None:
    inputs = {key: tensor.detach() for key, tensor in make_inputs().items()}
    inputs[name].requires_grad_()
    assert_chunked_is_reference(inputs)


def test_strided_inputs_equal_contiguous_ones() -> None:
    inputs = make_inputs()
    weights = weights_for(inputs)
    strided = {
        name: torch.cat([t.detach(), t.detach()], dim=-1)[..., : t.shape[-1]].requires_grad_()
        for name, t in inputs.items()
    }
    assert not strided["x_BLGP"].is_contiguous()
    assert_same(run(strided, "chunked", weights), run(inputs, "chunked", weights), 1e-13)


@pytest.mark.parametrize("length", [1, 200])
def test_without_gradients_the_result_is_the_same(length: int) -> None:
    inputs = make_inputs(length=length, documents=min(3, length))
    with_grad = ssd(**inputs, return_final_state=True, backend="chunked")
    with torch.no_grad():
        without = ssd(**inputs, return_final_state=True, backend="chunked")
    assert not without[0].requires_grad
    torch.testing.assert_close(without, tuple(t.detach() for t in with_grad), rtol=1e-13, atol=1e-13)


def test_inputs_are_left_as_they_are() -> None:
    inputs = make_inputs(documents=3)
    before = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    run(inputs, "chunked", weights_for(inputs))
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), name


def test_autocast_does_not_reach_the_recurrence() -> None:
    inputs = make_inputs(length=100, dtype=torch.float32)
    weights = weights_for(inputs)
    expected = run(inputs, "chunked", weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(inputs, "chunked", weights), expected, 0.0)


def test_gradients_survive_both_kinds_of_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = make_inputs(length=70)
    names = [name for name, tensor in inputs.items() if tensor.requires_grad]

    def scan(*tensors: Tensor) -> Tensor:
        return ssd(**inputs | dict(zip(names, tensors, strict=True)), backend="chunked")[0]

    learned = [inputs[name] for name in names]
    expected = torch.autograd.grad(scan(*learned).square().sum(), learned)
    again = torch.autograd.grad(checkpoint(scan, *learned, use_reentrant=False).square().sum(), learned)
    assert all(torch.equal(one, two) for one, two in zip(expected, again, strict=True))


def test_memory_kept_for_backward_is_the_inputs_and_few_states() -> None:
    inputs = make_inputs(1, 2048, heads=8, groups=2, width=16, states=16, dtype=torch.float32)
    states = 8 * 16 * 16
    own = sum(tensor.numel() for tensor in inputs.values())
    kept = kept_numel(partial(ssd, backend="chunked"), inputs)
    assert kept < own + 4 * inputs["dt_BLH"].numel() + 8 * states


@pytest.mark.timing
def test_chunked_is_many_times_faster_than_the_loop() -> None:
    # The threshold leaves room for neighbours on the machine.
    inputs = make_inputs(1, 1024, heads=8, groups=4, width=32, states=32, dtype=torch.float32)
    assert_chunked_is_faster_than_the_loop(ssd, inputs, times=5)

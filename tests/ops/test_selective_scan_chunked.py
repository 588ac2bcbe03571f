"""The chunked selective scan: its cuts, precision and gradients, what it keeps for the backward, how fast it is."""

from functools import partial

import pytest
import torch
from recurrence_checks import (
    assert_chunked_is_faster_than_the_loop,
    assert_gradients_are_right,
    assert_same,
    kept_numel,
)
from selective_scan_inputs import assert_chunked_is_reference, make_inputs, run, weights_for

from hybridize.ops.selective_scan import chunked, selective_scan


@pytest.mark.parametrize(
    ("block_numel", "call_numel"),
    [
        pytest.param(96 * 20, 96, id="one chunk per block, one sequence per pass"),
        pytest.param(96 * 50, 96 * 4, id="two sequences per pass, two chunks per block"),
        pytest.param(96 * 200, 96 * 20, id="a last block shorter than the others"),
        pytest.param(1, 1, id="the smallest blocks"),
    ],
)
def test_chunked_does_not_depend_on_how_it_is_cut(
    block_numel: int, call_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_BLOCK_NUMEL", block_numel)
    monkeypatch.setattr(chunked, "_CALL_NUMEL", call_numel)
    assert_chunked_is_reference(make_inputs(batch=3, length=333, documents=4))


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
    exact = {
        name: tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    exact_y, _ = selective_scan(**exact, backend="reference")
    error = (got["y"].double() - exact_y).detach().abs().max() / exact_y.detach().abs().max()
    assert float(error) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("dt", [-1e4, -30.0, 30.0, 1e4], ids=str)
@pytest.mark.parametrize("log_A", [-100.0, -30.0, 0.0, 12.0], ids=str)
def test_extreme_step_sizes_and_decays_stay_exact(dt: float, log_A: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(length=150, documents=3, dtype=dtype)
    extreme = {
        "dt_BLD": torch.where(torch.rand(2, 150, 24) < 0.3, dt, inputs["dt_BLD"].detach()).to(dtype),
        "A_DN": torch.where(torch.rand(24, 4) < 0.5, -torch.tensor(log_A).exp(), inputs["A_DN"].detach()).to(dtype),
    }
    inputs |= {name: tensor.requires_grad_() for name, tensor in extreme.items()}
    assert_chunked_is_reference(inputs, 1e-11 if dtype == torch.float64 else 2e-4)


def test_gradcheck_of_every_input() -> None:
    inputs = make_inputs(batch=1, length=70, channels=2, states=1, heads=2, groups=1, documents=3)
    assert_gradients_are_right(partial(selective_scan, backend="chunked"), inputs)


@pytest.mark.parametrize("name", ["x_BLD", "A_DN", "C_BLHN", "initial_state_BDN"])
def test_gradient_of_one_input_alone(name: str) -> None:
    inputs = {key: tensor.detach() for key, tensor in make_inputs().items()}
    inputs[name].requires_grad_()
    assert_chunked_is_reference(inputs)


def test_strided_inputs_equal_contiguous_ones() -> None:
    inputs = {name: tensor.detach() for name, tensor in make_inputs().items()}
    strided = {name: torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]] for name, tensor in inputs.items()}
    assert not strided["x_BLD"].is_contiguous()
    got, _ = selective_scan(**strided)
    expected, _ = selective_scan(**inputs)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("length", [1, 200])
def test_without_gradients_the_result_is_the_same(length: int) -> None:
    inputs = make_inputs(length=length, documents=min(3, length))
    with_grad = selective_scan(**inputs, return_final_state=True, backend="chunked")
    with torch.no_grad():
        without = selective_scan(**inputs, return_final_state=True, backend="chunked")
    assert not without[0].requires_grad
    torch.testing.assert_close(without, tuple(t.detach() for t in with_grad), rtol=1e-13, atol=1e-13)


def test_inputs_are_left_as_they_are() -> None:
    inputs = make_inputs(documents=3)
    before = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    run(inputs, "chunked", weights_for(inputs))
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), name


def test_memory_kept_for_backward_does_not_grow_with_states() -> None:
    scan = partial(selective_scan, backend="chunked")
    few, many = (kept_numel(scan, make_inputs(1, 2048, 64, states, 4, 4, torch.float32)) for states in (2, 24))
    tokens_x_channels = 2048 * 64
    # Twelve times as many states: only B, C (8 of 64 wide) and the few kept states may grow.
    assert many - few < 5 * tokens_x_channels
    assert many < 15 * tokens_x_channels


@pytest.mark.timing
def test_chunked_is_several_times_faster_than_the_loop() -> None:
    # Measured on two cores: 8 to 12 times forward, 9 times with the backward; the threshold leaves room for
    # neighbours on the machine.
    inputs = make_inputs(1, 1024, 256, 16, 16, 8, torch.float32)
    assert_chunked_is_faster_than_the_loop(selective_scan, inputs, times=5)

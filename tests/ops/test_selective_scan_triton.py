"""The selective scan's GPU kernels against the naive recurrence in fp64, and their door on a machine without a GPU."""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.ops import selective_scan as door
from hybridize.ops.selective_scan import selective_scan, selective_scan_step


def gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def make_inputs(
    batch: int = 2, length: int = 63, channels: int = 128, states: int = 16, heads: int = 8, groups: int = 2,
    documents: int = 1, dtype: torch.dtype = torch.float32, device: str = "cuda"
) -> dict[str, Tensor]:  # fmt: skip
    inputs = {
        "x_BLD": torch.randn(batch, length, channels),
        "dt_BLD": torch.randn(batch, length, channels) * 2 - 2,
        "B_BLGN": torch.randn(batch, length, groups, states),
        "C_BLHN": torch.randn(batch, length, heads, states),
        "z_BLD": torch.randn(batch, length, channels),
    }
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    inputs |= {
        "A_DN": -torch.exp(torch.randn(channels, states)),
        "D_D": torch.randn(channels),
        "dt_bias_D": torch.randn(channels),
        "initial_state_BDN": torch.randn(batch, channels, states),
    }
    inputs = {name: tensor.to(device).requires_grad_() for name, tensor in inputs.items()}
    if documents > 1:
        starts_BL = torch.zeros(batch, length, dtype=torch.bool)
        for row in range(batch):
            starts_BL[row, torch.randperm(length)[: documents - 1]] = True
        inputs["starts_BL"] = starts_BL.to(device)
    return inputs


def weights_for(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    x_BLD, (channels, states) = inputs["x_BLD"], inputs["A_DN"].shape
    state_weight = torch.randn(x_BLD.shape[0], channels, states, device=x_BLD.device)
    return torch.randn(x_BLD.shape, device=x_BLD.device), state_weight


def run(inputs: dict[str, Tensor], weights: tuple[Tensor, Tensor], backend: str = "triton") -> dict[str, Tensor]:
    """Outputs and the gradients of a random linear function of them."""
    y_BLD, state_BDN = selective_scan(**inputs, return_final_state=True, backend=backend)
    assert state_BDN is not None
    value = (y_BLD * weights[0]).sum() + (state_BDN * weights[1]).sum()
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    grads = torch.autograd.grad(value, list(wanted.values()))
    return {"y": y_BLD.detach(), "state": state_BDN.detach(), **dict(zip(wanted, grads, strict=True))}


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor if tensor.dtype == torch.bool else tensor.detach().double().requires_grad_()
        for name, tensor in inputs.items()
    }


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each tensor at the scale of its largest entry."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape, name
        assert torch.isfinite(got[name]).all(), name
        scale = float(tensor.abs().max()) or 1.0
        error = float((got[name].double() - tensor).abs().max()) / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@gpu
@pytest.mark.parametrize("documents", [1, 3, 50])
@pytest.mark.parametrize("length", [1, 63, 1000])
def test_triton_equals_the_naive_recurrence(length: int, documents: int) -> None:
    inputs = make_inputs(length=length, documents=min(documents, length + 1))
    weights = weights_for(inputs)
    assert_close(run(inputs, weights), run(exact(inputs), weights, "reference"), 5e-6)


@gpu
@pytest.mark.parametrize("documents", [1, 3, 50])
def test_triton_equals_the_naive_recurrence_over_many_segments(documents: int) -> None:
    inputs = make_inputs(1, 16384, 32, 16, 2, 1, documents)
    weights = weights_for(inputs)
    assert_close(run(inputs, weights), run(exact(inputs), weights, "reference"), 5e-6)


@gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=["bf16", "fp16"])
def test_low_precision_inputs_keep_an_fp32_state(dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(length=1000, documents=3, dtype=dtype)
    weights = weights_for(inputs)
    got = run(inputs, weights)
    expected = run(exact(inputs), weights, "chunked")
    assert got["y"].dtype == dtype
    assert got["state"].dtype == torch.float32
    assert all(got[name].dtype == inputs[name].dtype for name in inputs if name in got)
    assert_close({"state": got["state"]}, {"state": expected["state"]}, 5e-6)
    assert_close(got, expected, tolerance)


@gpu
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"channels": 40, "states": 1, "heads": 8, "groups": 8}, id="one state"),
        pytest.param({"channels": 36, "states": 5, "heads": 12, "groups": 3}, id="odd sizes"),
        pytest.param({"channels": 7, "states": 16, "heads": 7, "groups": 1}, id="a head per channel"),
        pytest.param({"channels": 120, "states": 16, "heads": 2, "groups": 2}, id="a head of several blocks"),
        pytest.param({"channels": 64, "states": 8, "heads": 8, "groups": 4}, id="8 states"),
        pytest.param({"channels": 64, "states": 32, "heads": 2, "groups": 1}, id="32 states"),
        pytest.param({"channels": 128, "states": 64, "heads": 2, "groups": 1}, id="64 states"),
        pytest.param({"channels": 256, "states": 128, "heads": 2, "groups": 1}, id="128 states"),
    ],
)
def test_triton_takes_any_sizes(sizes: dict[str, int]) -> None:
    inputs = make_inputs(length=577, documents=4, **sizes)
    weights = weights_for(inputs)
    assert_close(run(inputs, weights), run(exact(inputs), weights, "chunked"), 5e-6)


@gpu
@pytest.mark.parametrize("without", ["D_D", "dt_bias_D", "z_BLD", "initial_state_BDN"])
def test_triton_takes_every_option(without: str) -> None:
    inputs = make_inputs(length=300)
    weights = weights_for(inputs)
    del inputs[without]
    assert_close(run(inputs, weights), run(exact(inputs), weights, "chunked"), 5e-6)


@gpu
def test_dt_softplus_off_takes_the_step_size_as_given() -> None:
    inputs = make_inputs(length=300)
    del inputs["dt_bias_D"]
    inputs["dt_BLD"] = torch.rand_like(inputs["dt_BLD"]).requires_grad_()
    y_BLD, _ = selective_scan(**inputs, dt_softplus=False, backend="triton")
    expected, _ = selective_scan(**exact(inputs), dt_softplus=False, backend="chunked")
    assert_close({"y": y_BLD.detach()}, {"y": expected.detach()}, 5e-6)


@gpu
@pytest.mark.parametrize("dt", [-1e4, -30.0, 30.0, 1e4], ids=str)
@pytest.mark.parametrize("log_A", [-100.0, -30.0, 0.0, 12.0], ids=str)
def test_extreme_step_sizes_and_decays_stay_finite_and_right(dt: float, log_A: float) -> None:
    inputs = make_inputs(length=700, documents=3)
    extreme = {
        "dt_BLD": torch.where(torch.rand_like(inputs["dt_BLD"]) < 0.3, dt, inputs["dt_BLD"].detach()),
        "A_DN": torch.where(torch.rand_like(inputs["A_DN"]) < 0.5, -torch.tensor(log_A).exp(), inputs["A_DN"].detach()),
    }
    inputs |= {name: tensor.requires_grad_() for name, tensor in extreme.items()}
    weights = weights_for(inputs)
    assert_close(run(inputs, weights), run(exact(inputs), weights, "chunked"), 5e-4)


@gpu
def test_every_output_is_written_and_the_bits_are_the_same_every_time() -> None:
    inputs = make_inputs(length=1000, documents=3, dtype=torch.bfloat16)
    weights = weights_for(inputs)
    first = run(inputs, weights)
    for _ in range(3):
        # Memory that the next run's outputs are likely to get, full of NaN.
        poison = [torch.full((2**power,), float("nan"), device="cuda") for power in range(8, 24) for _ in range(4)]
        del poison
        for name, tensor in run(inputs, weights).items():
            assert torch.equal(tensor, first[name]), name


@gpu
def test_a_document_does_not_see_what_came_before_it() -> None:
    inputs = make_inputs(batch=1, length=900)
    starts_BL = torch.zeros(1, 900, dtype=torch.bool, device="cuda")
    starts_BL[0, 377] = True
    changed = inputs | {
        name: torch.cat([torch.randn_like(inputs[name][:, :377]) * 1e6, inputs[name][:, 377:]], dim=1)
        for name in ("x_BLD", "B_BLGN")
    }
    first, _ = selective_scan(**inputs, starts_BL=starts_BL, backend="triton")
    second, _ = selective_scan(**changed, starts_BL=starts_BL, backend="triton")
    assert torch.equal(first[:, 377:], second[:, 377:])
    (grad,) = torch.autograd.grad(second[:, 377:].square().sum(), inputs["dt_BLD"])
    assert torch.equal(grad[:, :377], torch.zeros_like(grad[:, :377]))


@gpu
def test_packed_documents_equal_separate_ones() -> None:
    inputs = make_inputs(batch=1, length=3000, documents=7)
    starts_BL = inputs.pop("starts_BL")
    packed, _ = selective_scan(**inputs, starts_BL=starts_BL, backend="triton")
    bounds = [0, *(t for t in starts_BL[0].nonzero().flatten().tolist() if t > 0), 3000]
    for begin, end in pairwise(bounds):
        document = {
            name: tensor[:, begin:end] if "L" in name.split("_")[1] else tensor for name, tensor in inputs.items()
        }
        if starts_BL[0, begin]:
            del document["initial_state_BDN"]
        y_BLD, _ = selective_scan(**document, backend="triton")
        torch.testing.assert_close(packed[:, begin:end], y_BLD, rtol=1e-4, atol=1e-4)


@gpu
def test_strided_inputs_equal_contiguous_ones() -> None:
    inputs = {name: tensor.detach() for name, tensor in make_inputs(length=400).items()}
    strided = {name: torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]] for name, tensor in inputs.items()}
    strided["x_BLD"] = inputs["x_BLD"].transpose(0, 1).contiguous().transpose(0, 1)
    got, _ = selective_scan(**strided, backend="triton")
    expected, _ = selective_scan(**inputs, backend="triton")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@gpu
@pytest.mark.parametrize("name", ["x_BLD", "A_DN", "C_BLHN", "initial_state_BDN"])
def test_gradient_of_one_input_alone(name: str) -> None:
    inputs = {key: tensor.detach() for key, tensor in make_inputs().items()}
    weights = weights_for(inputs)
    inputs[name].requires_grad_()
    got, expected = run(inputs, weights), run(exact(inputs), weights, "chunked")
    assert_close({name: got[name]}, {name: expected[name]}, 5e-6)


@gpu
def test_nothing_waits_for_the_gpu() -> None:
    inputs = make_inputs(length=1000, documents=3)
    weights = weights_for(inputs)
    run(inputs, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype
        try:
            torch.cuda.set_sync_debug_mode("error")
            run(inputs, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_memory_kept_for_the_backward_does_not_grow_with_states() -> None:
    def kept_bytes(states: int) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs = make_inputs(1, 4096, 256, states, 16, 4, dtype=torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            selective_scan(**inputs, backend="triton")
        return sum(kept.values())

    # One bf16 number per token and channel is 2 MiB; 16 states are one more such (B, C and the kept states).
    assert kept_bytes(16) - kept_bytes(8) < 3 * 2**20
    assert kept_bytes(16) < 14 * 2**20


@gpu
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager_with_gradients() -> None:
    inputs = make_inputs(length=300, documents=3)
    weights = weights_for(inputs)

    def scan(**tensors: Tensor) -> Any:
        return selective_scan(**tensors, return_final_state=True, backend="triton")

    compiled = torch.compile(scan, fullgraph=True)
    outs = [torch.autograd.grad(_value(f(**inputs), weights), inputs["dt_BLD"])[0] for f in (scan, compiled)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)


@gpu
def test_the_operator_keeps_the_rules_of_pytorch() -> None:
    from hybridize.ops.selective_scan.triton import _scan

    inputs = make_inputs(batch=1, length=70, channels=32, heads=2, groups=1, documents=2)
    names = ("x_BLD", "dt_BLD", "A_DN", "B_BLGN", "C_BLHN", "D_D", "dt_bias_D", "z_BLD", "starts_BL")
    arguments = [*(inputs[name] for name in names), inputs["initial_state_BDN"], True, True]
    torch.library.opcheck(_scan, arguments, rtol=1e-3, atol=1e-3)


@gpu
def test_checkpointed_equals_plain() -> None:
    inputs = make_inputs(length=300, documents=3)
    weights = weights_for(inputs)

    def scan(x_BLD: Tensor) -> Any:
        return selective_scan(**inputs | {"x_BLD": x_BLD}, return_final_state=True, backend="triton")

    plain = torch.autograd.grad(_value(scan(inputs["x_BLD"]), weights), list(inputs.values())[:9])
    saved = torch.utils.checkpoint.checkpoint(scan, inputs["x_BLD"], use_reentrant=False)
    again = torch.autograd.grad(_value(saved, weights), list(inputs.values())[:9])
    assert all(map(torch.equal, plain, again))


@gpu
@pytest.mark.parametrize("options", [True, False], ids=["all options", "no options"])
def test_steps_equal_the_scan(options: bool) -> None:
    inputs = {name: tensor.detach() for name, tensor in make_inputs(length=20).items()}
    state_BDN = inputs["initial_state_BDN"]
    if not options:
        for name in ("D_D", "dt_bias_D", "z_BLD"):
            del inputs[name]
    whole, end_BDN = selective_scan(**inputs, return_final_state=True, backend="triton")
    before = state_BDN.clone()
    for t in range(20):
        y_BD, state_BDN = selective_scan_step(
            state_BDN,
            *(inputs[name][:, t] for name in ("x_BLD", "dt_BLD")),
            inputs["A_DN"],
            *(inputs[name][:, t] for name in ("B_BLGN", "C_BLHN")),
            D_D=inputs.get("D_D"),
            dt_bias_D=inputs.get("dt_bias_D"),
            z_BD=inputs["z_BLD"][:, t] if options else None,
        )
        torch.testing.assert_close(y_BD, whole[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state_BDN, end_BDN, rtol=1e-4, atol=1e-4)
    assert torch.equal(inputs["initial_state_BDN"], before)


@gpu
def test_the_default_on_a_gpu_is_triton_and_in_fp64_chunked() -> None:
    inputs = make_inputs(length=40)
    weights = weights_for(inputs)
    for given, backend in ((inputs, "triton"), (exact(inputs), "chunked")):
        y_BLD, _ = selective_scan(**given)
        expected, _ = selective_scan(**given, backend=backend)
        assert torch.equal(y_BLD, expected)
    assert_close(run(inputs, weights), run(exact(inputs), weights, "chunked"), 5e-6)


def _value(outputs: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> Tensor:
    return (outputs[0] * weights[0]).sum() + (outputs[1] * weights[1]).sum()


def test_triton_without_a_gpu_is_an_error_with_its_remedy() -> None:
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton's interpreter runs on a CPU")
    with pytest.raises(ValueError, match=r"triton.*use .*chunked"):
        selective_scan(**make_inputs(length=3, device="cpu"), backend="triton")


def test_the_door_keeps_fp64_from_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(name: str) -> Any:
        def backend(x_BLD: Tensor, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            calls.append((name, x_BLD.dtype))
            return x_BLD, x_BLD

        return backend

    monkeypatch.setattr(door, "_BACKEND_OF_DEVICE", {"cpu": "triton"})
    monkeypatch.setattr(door, "BACKENDS", {name: spy(name) for name in door.BACKENDS})
    inputs = make_inputs(length=3, device="cpu")
    selective_scan(**inputs)
    selective_scan(**exact(inputs))
    assert calls == [("triton", torch.float32), ("chunked", torch.float64)]


INTERPRETED = """
import torch
from hybridize.ops.selective_scan import triton as kernels
from tests.ops.test_selective_scan_triton import assert_close, exact, make_inputs, run, weights_for

kernels._KEPT_EVERY = 8
kernels._cut = lambda shape, batch, length, programs: kernels._Cut(3, 8 // shape.tokens, 8 // shape.tokens, 3)
inputs = make_inputs(1, 21, 4, 2, 2, 1, documents=2, device="cpu")
weights = weights_for(inputs)
assert_close(run(inputs, weights), run(exact(inputs), weights, "chunked"), 5e-6)
"""


@pytest.mark.skipif(torch.cuda.is_available() or not find_spec("triton"), reason="needs Triton and no GPU")
def test_the_kernels_equal_the_chunked_form_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("this Triton's interpreter does not go with this numpy")
    assert done.returncode == 0, done.stderr

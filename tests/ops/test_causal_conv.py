"""The causal convolution: three faces and a step, one formula, with gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.ops.causal_conv import causal_conv, causal_conv_step

LENGTHS = [1, 63, 1000]


def gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def make_inputs(
    batch: int = 2,
    length: int = 63,
    width: int = 3,
    groups: int = 4,
    times: int = 2,
    taps: int = 4,
    documents: int = 1,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Tensor]:
    channels = width * groups * times
    window = torch.randn(batch, groups, 1, width, taps).expand(-1, -1, times, -1, -1).flatten(1, 3)
    inputs = {
        "x_BLX": torch.randn(batch, length, width * groups),
        "weight_DK": torch.randn(channels, taps),
        "bias_D": torch.randn(channels),
        "window_BDK": window,
    }
    inputs = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in inputs.items()}
    if documents > 1:
        starts_BL = torch.zeros(batch, length, dtype=torch.bool)
        for row in range(batch):
            starts_BL[row, torch.randperm(length)[: documents - 1]] = True
        inputs["starts_BL"] = starts_BL.to(device)
    return inputs


def run(inputs: dict[str, Tensor], weight_BLD: Tensor, backend: str, **options: Any) -> dict[str, Tensor]:
    y_BLD, window_BDK = causal_conv(**inputs, return_window=True, backend=backend, **options)
    assert window_BDK is not None
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    grads = torch.autograd.grad((y_BLD * weight_BLD).sum(), list(wanted.values()), materialize_grads=True)
    return {"y": y_BLD, "new window": window_BDK, **dict(zip(wanted, grads, strict=True))}


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor if tensor.dtype == torch.bool else tensor.detach().double().requires_grad_()
        for name, tensor in inputs.items()
    }


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape, name
        error = float((got[name].double() - tensor.double()).detach().abs().max())
        scale = float(tensor.detach().abs().max()) or 1.0
        assert error <= tolerance * scale, f"{name}: relative error {error / scale:.1e}"


def output_weight(inputs: dict[str, Tensor]) -> Tensor:
    x_BLX = inputs["x_BLX"]
    return torch.randn(*x_BLX.shape[:2], inputs["weight_DK"].shape[0], device=x_BLX.device)


@pytest.mark.parametrize("documents", [1, 3, 50])
@pytest.mark.parametrize("length", LENGTHS)
def test_shifted_equals_reference_with_gradients(length: int, documents: int) -> None:
    inputs = make_inputs(length=length, documents=min(documents, length + 1))
    weight = output_weight(inputs)
    runs = [run(inputs, weight, backend, repeat=(3, 2)) for backend in ("shifted", "reference")]
    assert_close(*runs, 1e-12)


@pytest.mark.parametrize("without", ["bias_D", "window_BDK"])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("taps", [1, 2, 5])
def test_shifted_equals_reference_with_other_options(taps: int, activation: str | None, without: str) -> None:
    inputs = make_inputs(length=30, times=1, taps=taps, documents=4)
    del inputs[without]
    weight = output_weight(inputs)
    runs = [run(inputs, weight, backend, activation=activation) for backend in ("shifted", "reference")]
    assert_close(*runs, 1e-12)


def test_reference_is_the_convolution_of_torch() -> None:
    inputs = {name: tensor.detach() for name, tensor in make_inputs(times=1).items()}
    del inputs["window_BDK"]
    y_BLD, _ = causal_conv(**inputs, activation=None, backend="reference")
    padded = torch.nn.functional.pad(inputs["x_BLX"].transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded, inputs["weight_DK"].unsqueeze(1), inputs["bias_D"], groups=12)
    torch.testing.assert_close(y_BLD, expected.transpose(1, 2))


def test_repeated_blocks_equal_a_repeated_input() -> None:
    inputs = {name: tensor.detach() for name, tensor in make_inputs().items()}
    y_BLD, window_BDK = causal_conv(**inputs, repeat=(3, 2), return_window=True)
    wide = inputs["x_BLX"].unflatten(-1, (4, 3)).repeat_interleave(2, dim=2).flatten(2)
    expected = causal_conv(**inputs | {"x_BLX": wide}, return_window=True)
    torch.testing.assert_close((y_BLD, window_BDK), expected)


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (3, 30, 31), (62,)])
def test_a_convolution_in_pieces_equals_one_convolution(cuts: tuple[int, ...]) -> None:
    inputs = make_inputs(documents=6)
    whole, end = causal_conv(**inputs, repeat=(3, 2), return_window=True)
    window, pieces = inputs["window_BDK"], []
    for begin, stop in zip((0, *cuts), (*cuts, 63), strict=True):
        piece = {name: inputs[name][:, begin:stop] for name in ("x_BLX", "starts_BL")}
        y_BLD, window = causal_conv(**inputs | piece | {"window_BDK": window}, repeat=(3, 2), return_window=True)
        pieces.append(y_BLD)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(window, end)


@pytest.mark.parametrize("bias", [True, False])
def test_steps_equal_the_convolution(bias: bool) -> None:
    inputs = {name: tensor.detach() for name, tensor in make_inputs(length=9).items()}
    if not bias:
        del inputs["bias_D"]
    whole, end = causal_conv(**inputs, repeat=(3, 2), return_window=True)
    window, before = inputs["window_BDK"], inputs["window_BDK"].clone()
    for t in range(9):
        y_BD, window = causal_conv_step(
            window, inputs["x_BLX"][:, t], inputs["weight_DK"], inputs.get("bias_D"), repeat=(3, 2)
        )
        torch.testing.assert_close(y_BD, whole[:, t])
    torch.testing.assert_close(window, end)
    assert torch.equal(before, inputs["window_BDK"])


def test_no_gradient_crosses_a_document_boundary() -> None:
    inputs = make_inputs(batch=1)
    starts_BL = torch.zeros(1, 63, dtype=torch.bool)
    starts_BL[0, 20] = True
    y_BLD, _ = causal_conv(**inputs, repeat=(3, 2), starts_BL=starts_BL)
    (grad,) = torch.autograd.grad(y_BLD[:, 20:].square().sum(), inputs["x_BLX"])
    assert torch.equal(grad[:, :20], torch.zeros_like(grad[:, :20]))
    assert (grad[:, 20:] != 0).all()


def test_the_window_is_empty_of_what_another_document_left() -> None:
    inputs = make_inputs(batch=1, length=8, times=1)
    starts_BL = torch.zeros(1, 8, dtype=torch.bool)
    starts_BL[0, 6] = True
    _, window_BDK = causal_conv(**inputs, starts_BL=starts_BL, return_window=True)
    assert window_BDK is not None
    assert torch.equal(window_BDK[..., :2], torch.zeros(1, 12, 2, dtype=torch.float64))
    assert torch.equal(window_BDK[..., 2:], inputs["x_BLX"][:, 6:].transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sums_are_in_fp32(dtype: torch.dtype) -> None:
    inputs = make_inputs(length=200, dtype=dtype)
    y_BLD, window_BDK = causal_conv(**inputs, repeat=(3, 2), return_window=True)
    assert window_BDK is not None
    assert (y_BLD.dtype, window_BDK.dtype) == (dtype, dtype)
    expected, _ = causal_conv(**exact(inputs), repeat=(3, 2))
    # What is left is the rounding of the result.
    torch.testing.assert_close(y_BLD.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BLX": torch.zeros(2, 63)}, r"x_BLX: shape \(2, 63\); pass \[batch, length, channels\]|weight_DK"),
        ({"weight_DK": torch.zeros(23, 4)}, r"weight_DK: shape \(23, 4\); pass \[24, taps\]"),
        ({"bias_D": torch.zeros(12)}, r"bias_D: shape \(12,\); pass \[24\]"),
        ({"window_BDK": torch.zeros(2, 24, 3)}, r"window_BDK: shape \(2, 24, 3\); pass \[2, 24, 4\]"),
        ({"repeat": (5, 2)}, r"repeat: \(5, 2\) does not cut 12 channels into blocks"),
        ({"activation": "gelu"}, r"activation: 'gelu' is unknown; use 'silu' or None"),
        ({"backend": "fast"}, r"backend: 'fast' is unknown; use one of reference, shifted, triton, or None"),
        ({"starts_BL": torch.zeros(2, 62, dtype=torch.bool)}, r"starts_BL: .* pass a bool tensor of shape \[2, 63\]"),
    ],
)
def test_a_wrong_argument_is_named_with_its_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv(**{**make_inputs(), "repeat": (3, 2), **change})


def test_triton_without_a_gpu_is_an_error_with_its_remedy() -> None:
    with pytest.raises(ValueError, match=r"triton.*use .*shifted"):
        causal_conv(**make_inputs(dtype=torch.float32), repeat=(3, 2), backend="triton")


@gpu
@pytest.mark.parametrize("documents", [1, 3, 50])
@pytest.mark.parametrize("length", [*LENGTHS, 16384])
def test_triton_equals_the_exact_form_with_gradients(length: int, documents: int) -> None:
    documents = min(documents, length + 1)
    inputs = make_inputs(1, length, 16, 5, 4, 4, documents, torch.float32, "cuda")
    weight = output_weight(inputs)
    expected = run(exact(inputs), weight, "reference" if length < 2000 else "shifted", repeat=(16, 4))
    assert_close(run(inputs, weight, "triton", repeat=(16, 4)), expected, 1e-5)


@gpu
@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_triton_takes_every_option(activation: str | None, taps: int) -> None:
    inputs = make_inputs(3, 130, 7, 3, 1, taps, 4, torch.bfloat16, "cuda")
    del inputs["bias_D"], inputs["window_BDK"]
    weight = output_weight(inputs)
    expected = run(exact(inputs), weight, "shifted", activation=activation)
    assert_close(run(inputs, weight, "triton", activation=activation), expected, 1e-2)


@gpu
def test_triton_gives_the_same_bits_every_time_and_takes_strides() -> None:
    inputs = make_inputs(2, 300, 16, 4, 4, 4, 3, torch.bfloat16, "cuda")
    weight = output_weight(inputs)
    first = run(inputs, weight, "triton", repeat=(16, 4))
    poison = [torch.full((2**power,), float("nan"), device="cuda") for power in range(8, 22) for _ in range(4)]
    del poison
    wide = torch.cat([inputs["x_BLX"].detach(), inputs["x_BLX"].detach()], dim=-1)
    strided = inputs | {"x_BLX": wide[..., :64].requires_grad_()}
    for name, tensor in run(strided, weight, "triton", repeat=(16, 4)).items():
        assert torch.equal(tensor, first[name]), name


@gpu
@pytest.mark.filterwarnings("ignore")
def test_triton_can_be_compiled() -> None:
    inputs = make_inputs(2, 100, 16, 2, 4, 4, 3, torch.float32, "cuda")
    weight = output_weight(inputs)

    def convolve(**tensors: Tensor) -> Tensor:
        return causal_conv(**tensors, repeat=(16, 4), backend="triton")[0]

    grads = []
    for function in (convolve, torch.compile(convolve, fullgraph=True)):
        grads.append(torch.autograd.grad((function(**inputs) * weight).sum(), inputs["x_BLX"])[0])
    torch.testing.assert_close(*grads)

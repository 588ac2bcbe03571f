"""The selective scan: one recurrence, three faces, with gradients."""

import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.ops.selective_scan import chunked, selective_scan, selective_scan_step

LENGTHS = [1, 63, 1000]


@pytest.fixture(autouse=True)
def _fresh_but_reported_seed(record_property: Any) -> None:
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    record_property("seed", seed)
    print(f"seed {seed}")  # pytest shows it when the test fails


def make_inputs(
    batch: int = 2,
    length: int = 63,
    channels: int = 24,
    states: int = 4,
    heads: int = 6,
    groups: int = 3,
    dtype: torch.dtype = torch.float64,
    documents: int = 1,
) -> dict[str, Tensor]:
    inputs = {
        "x_BLD": torch.randn(batch, length, channels),
        "dt_BLD": torch.randn(batch, length, channels) * 2 - 2,
        "A_DN": -torch.exp(torch.randn(channels, states)),
        "B_BLGN": torch.randn(batch, length, groups, states),
        "C_BLHN": torch.randn(batch, length, heads, states),
        "D_D": torch.randn(channels),
        "dt_bias_D": torch.randn(channels),
        "z_BLD": torch.randn(batch, length, channels),
        "initial_state_BDN": torch.randn(batch, channels, states),
    }
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    if documents > 1:
        starts_BL = torch.zeros(batch, length, dtype=torch.bool)
        for row in range(batch):
            starts_BL[row, torch.randperm(length)[: documents - 1]] = True
        inputs["starts_BL"] = starts_BL
    return inputs


def run(inputs: dict[str, Tensor], backend: str, weights: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of a random linear function of them."""
    y_BLD, state_BDN = selective_scan(**inputs, return_final_state=True, backend=backend)
    assert state_BDN is not None
    value = (y_BLD * weights[0]).sum() + (state_BDN * weights[1]).sum()
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    grads = torch.autograd.grad(value, list(wanted.values()))
    return {"y": y_BLD, "state": state_BDN, **dict(zip(wanted, grads, strict=True))}


def weights_for(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    y_weight = torch.randn(inputs["x_BLD"].shape)
    state_weight = torch.randn(inputs["initial_state_BDN"].shape)
    return y_weight.to(inputs["x_BLD"].dtype), state_weight.to(inputs["x_BLD"].dtype)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each tensor at the scale of its largest entry."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.isfinite(tensor).all(), name
        scale = float(tensor.detach().abs().max()) or 1.0
        error = float((got[name].double() - tensor.double()).detach().abs().max()) / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("documents", [1, 3, 50])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_reference_with_gradients(length: int, documents: int) -> None:
    inputs = make_inputs(length=length, documents=min(documents, length + 1))
    weights = weights_for(inputs)
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), 1e-12)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"batch": 3, "channels": 8, "states": 1, "heads": 1, "groups": 1, "length": 300}, id="one"),
        pytest.param({"channels": 6, "states": 3, "heads": 6, "groups": 1, "length": 131}, id="head per channel"),
        pytest.param({"channels": 12, "states": 5, "heads": 4, "groups": 4, "length": 65}, id="groups are heads"),
    ],
)
def test_chunked_equals_reference_at_other_shapes(shape: dict[str, int]) -> None:
    inputs = make_inputs(**shape, documents=3)
    weights = weights_for(inputs)
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), 1e-12)


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
    inputs = make_inputs(batch=3, length=333, documents=4)
    weights = weights_for(inputs)
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), 1e-12)


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


@pytest.mark.parametrize("without", ["D_D", "dt_bias_D", "z_BLD", "initial_state_BDN"])
def test_chunked_equals_reference_without_an_option(without: str) -> None:
    inputs = make_inputs()
    weights = weights_for(inputs)
    del inputs[without]
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), 1e-12)


def test_dt_softplus_off_takes_the_step_size_as_given() -> None:
    inputs = make_inputs()
    del inputs["dt_bias_D"]
    weights = weights_for(inputs)
    direct = inputs | {"dt_BLD": torch.nn.functional.softplus(inputs["dt_BLD"]).detach()}
    expected, _ = selective_scan(**inputs, backend="reference")
    for backend in ("reference", "chunked"):
        got, _ = selective_scan(**direct, dt_softplus=False, backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    direct["dt_BLD"].requires_grad_()
    runs = []
    for backend in ("chunked", "reference"):
        y_BLD, _ = selective_scan(**direct, dt_softplus=False, backend=backend)
        runs.append({"dt": torch.autograd.grad((y_BLD * weights[0]).sum(), direct["dt_BLD"])[0]})
    assert_same(*runs, 1e-12)


def test_reference_equals_the_closed_form() -> None:
    # y_t = sum over r <= t, n of C_tn exp(A sum of steps r+1..t) step_r B_rn x_r: no recurrence.
    length, channels, states, heads, groups = 9, 8, 3, 4, 2
    inputs = make_inputs(1, length, channels, states, heads, groups)
    for name in ("D_D", "z_BLD", "initial_state_BDN"):
        del inputs[name]
    step = torch.log1p(torch.exp(inputs["dt_BLD"] + inputs["dt_bias_D"]))[0]
    expected = torch.zeros(length, channels, dtype=torch.float64)
    for t in range(length):
        for r in range(t + 1):
            for channel in range(channels):
                head = channel // (channels // heads)
                group = head // (heads // groups)
                decay = torch.exp(inputs["A_DN"][channel] * step[r + 1 : t + 1, channel].sum())
                product = inputs["C_BLHN"][0, t, head] * decay * inputs["B_BLGN"][0, r, group]
                expected[t, channel] += (product.sum() * step[r, channel] * inputs["x_BLD"][0, r, channel]).detach()
    y_BLD, _ = selective_scan(**inputs, backend="reference")
    torch.testing.assert_close(y_BLD[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_steps_equal_the_scan_with_gradients(length: int) -> None:
    inputs = make_inputs(length=length)
    weights = weights_for(inputs)
    state_BDN, y_steps = inputs["initial_state_BDN"], []
    steps = {name: inputs[name].unbind(1) for name in ("x_BLD", "dt_BLD", "B_BLGN", "C_BLHN", "z_BLD")}
    for t in range(length):
        y_BD, state_BDN = selective_scan_step(
            state_BDN,
            steps["x_BLD"][t],
            steps["dt_BLD"][t],
            inputs["A_DN"],
            steps["B_BLGN"][t],
            steps["C_BLHN"][t],
            D_D=inputs["D_D"],
            dt_bias_D=inputs["dt_bias_D"],
            z_BD=steps["z_BLD"][t],
        )
        y_steps.append(y_BD)
    y_BLD = torch.stack(y_steps, dim=1)
    value = (y_BLD * weights[0]).sum() + (state_BDN * weights[1]).sum()
    grads = torch.autograd.grad(value, list(inputs.values()))
    got = {"y": y_BLD, "state": state_BDN, **dict(zip(inputs, grads, strict=True))}
    assert_same(got, run(inputs, "chunked", weights), 1e-12)


def test_step_keeps_its_state_and_dtypes() -> None:
    inputs = make_inputs(length=1, dtype=torch.bfloat16)
    state_BDN = inputs["initial_state_BDN"].detach().float()
    before = state_BDN.clone()
    args = (inputs[name][:, 0] for name in ("x_BLD", "dt_BLD"))
    heads = (inputs[name][:, 0] for name in ("B_BLGN", "C_BLHN"))
    y_BD, new_state_BDN = selective_scan_step(state_BDN, *args, inputs["A_DN"], *heads)
    assert torch.equal(state_BDN, before)
    assert not torch.equal(new_state_BDN, before)
    assert (y_BD.dtype, new_state_BDN.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("num_documents", [3, 50])
def test_packed_equals_unpacked(backend: str, num_documents: int) -> None:
    inputs = make_inputs(batch=1, length=1000, documents=num_documents)
    starts_BL = inputs.pop("starts_BL")
    weights = weights_for(inputs)
    packed = run(inputs | {"starts_BL": starts_BL}, backend, weights)
    bounds = [0, *(t for t in starts_BL[0].nonzero().flatten().tolist() if t > 0), 1000]
    values, states = [], []
    for begin, end in pairwise(bounds):
        document = {
            name: tensor[:, begin:end] if "L" in name.split("_")[1] else tensor for name, tensor in inputs.items()
        }
        if starts_BL[0, begin]:
            del document["initial_state_BDN"]
        y_BLD, state_BDN = selective_scan(**document, return_final_state=True, backend=backend)
        values.append(y_BLD)
        states.append(state_BDN)
    y_BLD = torch.cat(values, dim=1)
    value = (y_BLD * weights[0]).sum() + (states[-1] * weights[1]).sum()
    grads = torch.autograd.grad(value, list(inputs.values()), materialize_grads=True)
    assert_same(packed, {"y": y_BLD, "state": states[-1], **dict(zip(inputs, grads, strict=True))}, 1e-12)


def test_a_start_at_the_first_token_wipes_the_initial_state() -> None:
    inputs = make_inputs(documents=1)
    starts_BL = torch.zeros(2, 63, dtype=torch.bool)
    starts_BL[0, 0] = True
    for backend in ("reference", "chunked"):
        y_BLD, _ = selective_scan(**inputs, starts_BL=starts_BL, backend=backend)
        (grad,) = torch.autograd.grad(y_BLD.square().sum(), inputs["initial_state_BDN"])
        assert torch.equal(grad[0], torch.zeros_like(grad[0]))
        assert (grad[1] != 0).any()


def test_a_document_does_not_see_what_came_before_it() -> None:
    inputs = make_inputs(batch=1, length=200)
    starts_BL = torch.zeros(1, 200, dtype=torch.bool)
    starts_BL[0, 77] = True
    changed = inputs | {
        name: torch.cat([torch.randn_like(inputs[name][:, :77]) * 1e6, inputs[name][:, 77:]], dim=1)
        for name in ("x_BLD", "B_BLGN")
    }
    first, _ = selective_scan(**inputs, starts_BL=starts_BL, backend="chunked")
    second, _ = selective_scan(**changed, starts_BL=starts_BL, backend="chunked")
    assert torch.equal(first[:, 77:], second[:, 77:])
    assert not torch.equal(first[:, :77], second[:, :77])


@pytest.mark.parametrize("cuts", [(1,), (40,), (7, 64, 65, 150)])
def test_a_scan_in_pieces_equals_one_scan(cuts: tuple[int, ...]) -> None:
    inputs = make_inputs(length=200)
    weights = weights_for(inputs)
    whole = run(inputs, "chunked", weights)
    state_BDN, pieces = inputs["initial_state_BDN"], []
    for begin, end in zip((0, *cuts), (*cuts, 200), strict=True):
        piece = {name: tensor[:, begin:end] if "L" in name.split("_")[1] else tensor for name, tensor in inputs.items()}
        piece["initial_state_BDN"] = state_BDN
        y_BLD, state_BDN = selective_scan(**piece, return_final_state=True, backend="chunked")
        pieces.append(y_BLD)
    y_BLD = torch.cat(pieces, dim=1)
    value = (y_BLD * weights[0]).sum() + (state_BDN * weights[1]).sum()
    grads = torch.autograd.grad(value, list(inputs.values()))
    assert_same({"y": y_BLD, "state": state_BDN, **dict(zip(inputs, grads, strict=True))}, whole, 1e-12)


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
    weights = weights_for(inputs)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), tolerance)


def test_gradcheck_of_every_input() -> None:
    inputs = make_inputs(batch=1, length=70, channels=2, states=1, heads=2, groups=1, documents=3)
    starts_BL = inputs.pop("starts_BL")
    names = list(inputs)

    def scan(*tensors: Tensor) -> Any:
        named = dict(zip(names, tensors, strict=True))
        return selective_scan(**named, starts_BL=starts_BL, return_final_state=True, backend="chunked")

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()), fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("name", ["x_BLD", "A_DN", "C_BLHN", "initial_state_BDN"])
def test_gradient_of_one_input_alone(name: str) -> None:
    inputs = {key: tensor.detach() for key, tensor in make_inputs().items()}
    inputs[name].requires_grad_()
    weights = weights_for(inputs)
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), 1e-12)


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
    def kept_numel(states: int) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
            return tensor

        inputs = make_inputs(1, 2048, 64, states, 4, 4, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            selective_scan(**inputs, backend="chunked")
        return sum(kept.values())

    tokens_x_channels = 2048 * 64
    # Twelve times as many states: only B, C (8 of 64 wide) and the few kept states may grow.
    assert kept_numel(24) - kept_numel(2) < 5 * tokens_x_channels
    assert kept_numel(24) < 15 * tokens_x_channels


@pytest.mark.timing
def test_chunked_is_several_times_faster_than_the_loop() -> None:
    # Measured on two cores: 8 to 12 times forward, 9 times with the backward; the threshold leaves room for
    # neighbours on the machine. Best of several runs each, and of several rounds.
    inputs = make_inputs(1, 1024, 256, 16, 16, 8, torch.float32)

    def best_seconds(backend: str, runs: int) -> float:
        seconds = []
        for _ in range(runs):
            begin = time.perf_counter()
            selective_scan(**inputs, backend=backend)
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    ratios = []
    with torch.no_grad():
        for _ in range(5):
            fast = best_seconds("chunked", 20)
            ratios.append(best_seconds("reference", 2) / fast)
            if ratios[-1] > 5:
                return
    pytest.fail(f"chunked over reference: {ratios}")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x_BLD", (2, 63), r"x_BLD: shape \(2, 63\)"),
        ("x_BLD", (2, 0, 24), r"x_BLD: shape \(2, 0, 24\)"),
        ("dt_BLD", (2, 63, 23), r"dt_BLD: shape \(2, 63, 23\); pass \[2, 63, 24\]"),
        ("A_DN", (4, 24), r"A_DN: shape \(4, 24\); pass \[24, states\]"),
        ("B_BLGN", (2, 63, 4, 4), r"B_BLGN: 4 groups do not divide 6 heads"),
        ("B_BLGN", (2, 63, 3, 5), r"B_BLGN: shape .* pass \[2, 63, groups, 4\]"),
        ("C_BLHN", (2, 63, 5, 4), r"C_BLHN: 5 heads do not divide 24 channels"),
        ("C_BLHN", (2, 62, 6, 4), r"C_BLHN: shape .* pass \[2, 63, heads, 4\]"),
        ("D_D", (23,), r"D_D: shape \(23,\); pass \[24\]"),
        ("initial_state_BDN", (2, 4, 24), r"initial_state_BDN: shape .* pass \[2, 24, 4\]"),
    ],
)
def test_a_wrong_shape_is_named_with_its_remedy(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**make_inputs() | {name: torch.zeros(shape, dtype=torch.float64)})


def test_other_wrong_arguments_are_named() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"backend: 'fast' is unknown; use one of reference, chunked"):
        selective_scan(**inputs, backend="fast")
    with pytest.raises(ValueError, match=r"starts_BL: dtype torch.int64; pass a bool"):
        selective_scan(**inputs, starts_BL=torch.zeros(2, 63, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"A_DN: has positive entries.*pass -exp"):
        selective_scan(**inputs | {"A_DN": -inputs["A_DN"]}, backend="chunked")
    with pytest.raises(ValueError, match=r"x_BLD: dtype torch.int64 is not a float"):
        selective_scan(**inputs | {"x_BLD": torch.zeros(2, 63, 24, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"dt_BD: shape \(2, 3\); pass \[2, 24\]"):
        selective_scan_step(
            inputs["initial_state_BDN"],
            inputs["x_BLD"][:, 0],
            torch.zeros(2, 3),
            inputs["A_DN"],
            inputs["B_BLGN"][:, 0],
            inputs["C_BLHN"][:, 0],
        )

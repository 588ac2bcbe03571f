"""State space duality: one recurrence, its faces, with gradients."""

import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.ops.fla_package import sequence_bounds
from hybridize.ops.ssd import chunks, ssd, ssd_step
from hybridize.ops.ssd.fla import ssd_fla

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
    heads: int = 6,
    groups: int = 3,
    width: int = 4,
    states: int = 5,
    dtype: torch.dtype = torch.float64,
    documents: int = 1,
) -> dict[str, Tensor]:
    inputs = {
        "x_BLGP": torch.randn(batch, length, groups, width),
        "dt_BLH": torch.randn(batch, length, heads) * 2 - 2,
        "A_H": -torch.exp(torch.randn(heads)),
        "B_BLGN": torch.randn(batch, length, groups, states),
        "C_BLHN": torch.randn(batch, length, heads, states),
        "D_H": torch.randn(heads),
        "dt_bias_H": torch.randn(heads),
        "initial_state_BHPN": torch.randn(batch, heads, width, states),
    }
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    if documents > 1:
        starts_BL = torch.zeros(batch, length, dtype=torch.bool)
        for row in range(batch):
            starts_BL[row, torch.randperm(length)[: documents - 1]] = True
        inputs["starts_BL"] = starts_BL
    return inputs


def weights_for(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    batch, length, heads, states = inputs["C_BLHN"].shape
    width, dtype = inputs["x_BLGP"].shape[-1], inputs["x_BLGP"].dtype
    return torch.randn(batch, length, heads, width, dtype=dtype), torch.randn(batch, heads, width, states, dtype=dtype)


def run(inputs: dict[str, Tensor], backend: str, weights: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of a random linear function of them."""
    y_BLHP, state_BHPN = ssd(**inputs, return_final_state=True, backend=backend)
    assert state_BHPN is not None
    value = (y_BLHP * weights[0]).sum() + (state_BHPN * weights[1]).sum()
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    grads = torch.autograd.grad(value, list(wanted.values()))
    return {"y": y_BLHP, "state": state_BHPN, **dict(zip(wanted, grads, strict=True))}


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


def over_time(name: str) -> bool:
    return "L" in name.split("_")[1]


@pytest.mark.parametrize("documents", [1, 3, 50])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_reference_with_gradients(length: int, documents: int) -> None:
    inputs = make_inputs(length=length, documents=min(documents, length + 1))
    weights = weights_for(inputs)
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), 1e-12)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"heads": 1, "groups": 1, "width": 1, "states": 1, "length": 300}, id="ones"),
        pytest.param({"heads": 4, "groups": 4, "width": 3, "states": 16, "length": 129}, id="groups are heads"),
        pytest.param({"batch": 3, "heads": 8, "groups": 1, "width": 16, "states": 2, "length": 64}, id="one group"),
    ],
)
def test_chunked_equals_reference_at_other_shapes(shape: dict[str, int]) -> None:
    inputs = make_inputs(**shape, documents=3)
    weights = weights_for(inputs)
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), 1e-12)


@pytest.mark.parametrize(("chunk", "block_numel"), [(1, 1), (5, 1), (16, 4 * 2 * 6 * 256), (64, 1)], ids=str)
def test_chunked_does_not_depend_on_how_it_is_cut(
    chunk: int, block_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunks._CHUNK, "cpu", (chunk, chunk))
    monkeypatch.setitem(chunks._BLOCK_NUMEL, "cpu", block_numel)
    inputs = make_inputs(length=203, documents=4)
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


@pytest.mark.parametrize("without", ["D_H", "dt_bias_H", "initial_state_BHPN"])
def test_chunked_equals_reference_without_an_option(without: str) -> None:
    inputs = make_inputs()
    weights = weights_for(inputs)
    del inputs[without]
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), 1e-12)


def test_dt_softplus_off_takes_the_step_size_as_given() -> None:
    inputs = make_inputs()
    direct = inputs | {"dt_BLH": torch.nn.functional.softplus(inputs["dt_BLH"] + inputs["dt_bias_H"])}
    del direct["dt_bias_H"]
    for backend in ("reference", "chunked"):
        got, _ = ssd(**direct, dt_softplus=False, backend=backend)
        expected, _ = ssd(**inputs, backend="reference")
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_reference_equals_the_closed_form() -> None:
    # y_t = sum over r <= t of (C_t · B_r) exp(A sum of steps r+1..t) step_r x_r, plus D x_t: no recurrence.
    length, heads, groups, width = 9, 4, 2, 3
    inputs = make_inputs(1, length, heads, groups, width)
    del inputs["initial_state_BHPN"]
    step = torch.log1p(torch.exp(inputs["dt_BLH"] + inputs["dt_bias_H"]))[0]
    expected = torch.zeros(length, heads, width, dtype=torch.float64)
    for t in range(length):
        for head in range(heads):
            group = head // (heads // groups)
            expected[t, head] = (inputs["D_H"][head] * inputs["x_BLGP"][0, t, group]).detach()
            for r in range(t + 1):
                decay = torch.exp(inputs["A_H"][head] * step[r + 1 : t + 1, head].sum())
                score = inputs["C_BLHN"][0, t, head] @ inputs["B_BLGN"][0, r, group] * decay * step[r, head]
                expected[t, head] += (score * inputs["x_BLGP"][0, r, group]).detach()
    y_BLHP, _ = ssd(**inputs, backend="reference")
    torch.testing.assert_close(y_BLHP[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_steps_equal_the_scan_with_gradients(length: int) -> None:
    inputs = make_inputs(length=length)
    weights = weights_for(inputs)
    state_BHPN, y_steps = inputs["initial_state_BHPN"], []
    steps = {name: inputs[name].unbind(1) for name in inputs if over_time(name)}
    for t in range(length):
        y_BHP, state_BHPN = ssd_step(
            state_BHPN,
            steps["x_BLGP"][t],
            steps["dt_BLH"][t],
            inputs["A_H"],
            steps["B_BLGN"][t],
            steps["C_BLHN"][t],
            D_H=inputs["D_H"],
            dt_bias_H=inputs["dt_bias_H"],
        )
        y_steps.append(y_BHP)
    y_BLHP = torch.stack(y_steps, dim=1)
    value = (y_BLHP * weights[0]).sum() + (state_BHPN * weights[1]).sum()
    grads = torch.autograd.grad(value, list(inputs.values()))
    got = {"y": y_BLHP, "state": state_BHPN, **dict(zip(inputs, grads, strict=True))}
    assert_same(got, run(inputs, "chunked", weights), 1e-12)


def test_step_keeps_its_state_and_dtypes() -> None:
    inputs = make_inputs(length=1, dtype=torch.bfloat16)
    state_BHPN = inputs["initial_state_BHPN"].detach().float()
    before = state_BHPN.clone()
    x_BGP, dt_BH, B_BGN, C_BHN = (inputs[name][:, 0] for name in ("x_BLGP", "dt_BLH", "B_BLGN", "C_BLHN"))
    y_BHP, new_state_BHPN = ssd_step(state_BHPN, x_BGP, dt_BH, inputs["A_H"], B_BGN, C_BHN)
    assert torch.equal(state_BHPN, before)
    assert not torch.equal(new_state_BHPN, before)
    assert (y_BHP.dtype, new_state_BHPN.dtype) == (torch.bfloat16, torch.float32)


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
        document = {name: tensor[:, begin:end] if over_time(name) else tensor for name, tensor in inputs.items()}
        if starts_BL[0, begin]:
            del document["initial_state_BHPN"]
        y_BLHP, state_BHPN = ssd(**document, return_final_state=True, backend=backend)
        values.append(y_BLHP)
        states.append(state_BHPN)
    y_BLHP = torch.cat(values, dim=1)
    value = (y_BLHP * weights[0]).sum() + (states[-1] * weights[1]).sum()
    grads = torch.autograd.grad(value, list(inputs.values()), materialize_grads=True)
    assert_same(packed, {"y": y_BLHP, "state": states[-1], **dict(zip(inputs, grads, strict=True))}, 1e-12)


def test_a_start_at_the_first_token_wipes_the_initial_state() -> None:
    inputs = make_inputs()
    starts_BL = torch.zeros(2, 63, dtype=torch.bool)
    starts_BL[0, 0] = True
    for backend in ("reference", "chunked"):
        y_BLHP, _ = ssd(**inputs, starts_BL=starts_BL, backend=backend)
        (grad,) = torch.autograd.grad(y_BLHP.square().sum(), inputs["initial_state_BHPN"])
        assert torch.equal(grad[0], torch.zeros_like(grad[0]))
        assert (grad[1] != 0).any()


def test_nothing_crosses_a_document_boundary_either_way() -> None:
    inputs = make_inputs(batch=1, length=200)
    starts_BL = torch.zeros(1, 200, dtype=torch.bool)
    starts_BL[0, 77] = True
    first, _ = ssd(**inputs, starts_BL=starts_BL, backend="chunked")
    for names, scale, tolerance in ((("x_BLGP", "B_BLGN"), 1e6, 0.0), (("dt_BLH",), 1.0, 1e-12)):
        changed = inputs | {
            name: torch.cat([torch.randn_like(inputs[name][:, :77]) * scale, inputs[name][:, 77:]], dim=1)
            for name in names
        }
        second, _ = ssd(**changed, starts_BL=starts_BL, backend="chunked")
        torch.testing.assert_close(first[:, 77:], second[:, 77:], rtol=tolerance, atol=tolerance)
        assert not torch.allclose(first[:, :77], second[:, :77])
    names = ("x_BLGP", "dt_BLH", "B_BLGN", "C_BLHN")
    for grad in torch.autograd.grad(first[:, 77:].square().sum(), [inputs[name] for name in names]):
        assert torch.equal(grad[:, :77], torch.zeros_like(grad[:, :77]))
        assert (grad[:, 78:] != 0).any()


@pytest.mark.parametrize("cuts", [(1,), (40,), (7, 64, 65, 150)])
def test_a_scan_in_pieces_equals_one_scan(cuts: tuple[int, ...]) -> None:
    inputs = make_inputs(length=200)
    weights = weights_for(inputs)
    whole = run(inputs, "chunked", weights)
    state_BHPN, pieces = inputs["initial_state_BHPN"], []
    for begin, end in pairwise((0, *cuts, 200)):
        piece = {name: tensor[:, begin:end] if over_time(name) else tensor for name, tensor in inputs.items()}
        piece["initial_state_BHPN"] = state_BHPN
        y_BLHP, state_BHPN = ssd(**piece, return_final_state=True, backend="chunked")
        pieces.append(y_BLHP)
    y_BLHP = torch.cat(pieces, dim=1)
    value = (y_BLHP * weights[0]).sum() + (state_BHPN * weights[1]).sum()
    grads = torch.autograd.grad(value, list(inputs.values()))
    assert_same({"y": y_BLHP, "state": state_BHPN, **dict(zip(inputs, grads, strict=True))}, whole, 1e-12)


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
    weights = weights_for(inputs)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), tolerance)


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
    starts_BL = inputs.pop("starts_BL")
    names = list(inputs)

    def scan(*tensors: Tensor) -> Any:
        named = dict(zip(names, tensors, strict=True))
        return ssd(**named, starts_BL=starts_BL, return_final_state=True, backend="chunked")

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()), fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("name", ["x_BLGP", "A_H", "D_H", "C_BLHN", "initial_state_BHPN"])
def test_gradient_of_one_input_alone(name: str) -> None:
    inputs = {key: tensor.detach() for key, tensor in make_inputs().items()}
    inputs[name].requires_grad_()
    weights = weights_for(inputs)
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), 1e-12)


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


def test_memory_kept_for_backward_is_the_inputs_and_few_states() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    inputs = make_inputs(1, 2048, heads=8, groups=2, width=16, states=16, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ssd(**inputs, backend="chunked")
    states = 8 * 16 * 16
    own = sum(tensor.numel() for tensor in inputs.values())
    assert sum(kept.values()) < own + 4 * inputs["dt_BLH"].numel() + 8 * states


@pytest.mark.timing
def test_chunked_is_many_times_faster_than_the_loop() -> None:
    # The threshold leaves room for neighbours on the machine. Best of several runs each, and of several rounds.
    inputs = make_inputs(1, 1024, heads=8, groups=4, width=32, states=32, dtype=torch.float32)

    def best_seconds(backend: str, runs: int) -> float:
        seconds = []
        for _ in range(runs):
            begin = time.perf_counter()
            ssd(**inputs, backend=backend)
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


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What fla's kernel computes, by its documentation, one token after the other."""
    assert output_final_state
    assert all(tensor.is_contiguous() for tensor in (q, k, v, g))
    assert float(g.min()) > -100, "the kernel subtracts sums of these: strong ones cost the others their digits"
    bounds = list(range(0, q.shape[0] * q.shape[1] + 1, q.shape[1])) if cu_seqlens is None else cu_seqlens.tolist()
    if cu_seqlens is not None:
        assert q.shape[0] == 1
        assert initial_state is None or len(initial_state) == len(bounds) - 1
    rows = [tensor.flatten(0, 1) for tensor in (q, k, v, g)]
    outs, states = [], []
    for index, (begin, end) in enumerate(pairwise(bounds)):
        state = torch.zeros(q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state[index]
        for t in range(begin, end):
            q_t, k_t, v_t, g_t = (tensor[t] for tensor in rows)
            state = g_t.exp()[:, None, None] * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
            outs.append(scale * (state * q_t.unsqueeze(-1)).sum(dim=1))
        states.append(state)
    return torch.stack(outs).view(*q.shape[:3], -1), torch.stack(states)


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("documents", [1, 3, 20])
def test_fla_is_handed_the_same_recurrence(documents: int, initial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel itself runs on a GPU only; what it is handed and what is made of it is checked here.
    import sys
    import types

    module = types.ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = simple_gla  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    inputs = {
        name: tensor.detach() for name, tensor in make_inputs(dtype=torch.float32, documents=documents, batch=3).items()
    }
    if not initial:
        del inputs["initial_state_BHPN"]
    y_BLHP, state_BHPN = ssd_fla(**inputs)
    expected = ssd(**inputs, return_final_state=True, backend="reference")
    assert_same({"y": y_BLHP, "state": state_BHPN}, dict(zip(("y", "state"), expected, strict=True)), 1e-5)


def test_bounds_of_documents_are_cut_at_rows_too() -> None:
    starts_BL = torch.tensor([[False, True, False], [True, False, False], [False, False, True]])
    bounds_S1, first_B, last_B = sequence_bounds(starts_BL)
    assert bounds_S1.tolist() == [0, 1, 3, 6, 8, 9]
    assert first_B.tolist() == [0, 2, 3]
    assert last_B.tolist() == [1, 2, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", [None, "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", LENGTHS)
def test_gpu_equals_the_exact_reference(length: int, dtype: torch.dtype, backend: str | None) -> None:
    inputs = make_inputs(length=length, heads=8, groups=2, width=32, states=64, documents=min(3, length))
    exact = {name: tensor.detach().cuda() for name, tensor in inputs.items()}
    rounded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in exact.items()}
    exact = {name: t.double().requires_grad_() if t.is_floating_point() else t for name, t in rounded.items()}
    rounded = {name: t.clone().requires_grad_() if t.is_floating_point() else t for name, t in rounded.items()}
    weights = tuple(weight.cuda() for weight in weights_for(inputs))
    expected = run(exact, "reference", weights)
    with torch.no_grad():
        y_BLHP, _ = ssd(**rounded, backend=backend)
    got = run(rounded, backend, weights)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    got = {name: tensor.double() for name, tensor in got.items()}
    assert_same(got, expected, tolerance)
    assert_same({"y": y_BLHP.double()}, {"y": expected["y"]}, tolerance)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x_BLGP", (2, 63, 12), r"x_BLGP: shape \(2, 63, 12\)"),
        ("x_BLGP", (2, 0, 3, 4), r"x_BLGP: shape \(2, 0, 3, 4\)"),
        ("x_BLGP", (2, 63, 4, 4), r"C_BLHN: 6 heads are no multiple of x's 4 groups"),
        ("dt_BLH", (2, 63, 5), r"dt_BLH: shape \(2, 63, 5\); pass \[2, 63, 6\]"),
        ("A_H", (3,), r"A_H: shape \(3,\); pass \[6\]"),
        ("B_BLGN", (2, 63, 3, 4), r"B_BLGN: shape .* pass \[2, 63, 3, 5\]"),
        ("C_BLHN", (2, 62, 6, 5), r"C_BLHN: shape .* pass \[2, 63, heads, states\]"),
        ("D_H", (5,), r"D_H: shape \(5,\); pass \[6\]"),
        ("initial_state_BHPN", (2, 6, 5, 4), r"initial_state_BHPN: shape .* pass \[2, 6, 4, 5\]"),
    ],
)
def test_a_wrong_shape_is_named_with_its_remedy(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**make_inputs() | {name: torch.zeros(shape, dtype=torch.float64)})


def test_other_wrong_arguments_are_named() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"backend: 'fast' is unknown; use one of reference, chunked"):
        ssd(**inputs, backend="fast")
    with pytest.raises(ValueError, match=r"backend: 'fla' cannot serve here, since x lies on cpu"):
        ssd(**inputs, backend="fla")
    with pytest.raises(ValueError, match=r"starts_BL: dtype torch.int64; pass a bool"):
        ssd(**inputs, starts_BL=torch.zeros(2, 63, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"A_H: has positive entries.*pass -exp"):
        ssd(**inputs | {"A_H": -inputs["A_H"]})
    with pytest.raises(ValueError, match=r"x_BLGP: dtype torch.int64 is not a float"):
        ssd(**inputs | {"x_BLGP": torch.zeros(2, 63, 3, 4, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"dt_BH: shape \(2, 3\); pass \[2, 6\]"):
        ssd_step(
            inputs["initial_state_BHPN"],
            inputs["x_BLGP"][:, 0],
            torch.zeros(2, 3),
            inputs["A_H"],
            inputs["B_BLGN"][:, 0],
            inputs["C_BLHN"][:, 0],
        )


@pytest.mark.parametrize("documents", [1, 3])
def test_strong_decays_are_tamed_for_fla(documents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = simple_gla  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    inputs = {name: t.detach() for name, t in make_inputs(dtype=torch.float32, documents=documents).items()}
    inputs["dt_BLH"] = 300 * inputs["dt_BLH"]
    y_BLHP, state_BHPN = ssd_fla(**inputs)
    expected = ssd(**inputs, return_final_state=True, backend="reference")
    assert_same({"y": y_BLHP, "state": state_BHPN}, dict(zip(("y", "state"), expected, strict=True)), 1e-5)


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

"""The two ops with a delta rule, gated delta and Kimi delta: one recurrence, its faces, with gradients."""

import math
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from delta_rule_inputs import (
    EXACT,
    LENGTHS,
    OPS,
    assert_chunked_is_reference,
    assert_same,
    both_ops,
    decay_name,
    make_inputs,
    run,
    weights_for,
)
from torch import Tensor

from hybridize.ops.delta_rule import chunked
from hybridize.ops.gated_delta import gated_delta_rule
from hybridize.ops.kimi_delta import kimi_delta_attention


@both_ops
@pytest.mark.parametrize("documents", [1, 20])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_reference_with_gradients(op: str, length: int, documents: int) -> None:
    assert_chunked_is_reference(op, make_inputs(op, length=length, documents=min(documents, length + 1)))


@both_ops
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"batch": 3, "heads": 1, "groups": 1, "key_width": 1, "value_width": 1, "length": 130}, id="one"),
        pytest.param({"heads": 6, "groups": 1, "key_width": 3, "value_width": 8, "length": 65}, id="one group"),
        pytest.param({"heads": 4, "groups": 4, "key_width": 8, "value_width": 2, "length": 64}, id="a group each"),
    ],
)
def test_chunked_equals_reference_at_other_shapes(op: str, shape: dict[str, int]) -> None:
    assert_chunked_is_reference(op, make_inputs(op, **shape, documents=3))


@both_ops
@pytest.mark.parametrize("without", ["initial_state_BHKV", "beta_BLH"])
def test_chunked_equals_reference_without_a_state_or_a_gradient(op: str, without: str) -> None:
    inputs = make_inputs(op)
    if without == "initial_state_BHKV":
        del inputs[without]
    else:
        inputs[without] = inputs[without].detach()
    assert_chunked_is_reference(op, inputs)


@both_ops
@pytest.mark.parametrize(("chunk", "numel"), [(2, 1), (16, 1), (64, 2 * 24 * 64), (128, 1 << 20)])
def test_chunked_does_not_depend_on_how_it_is_cut(
    op: str, chunk: int, numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_ON_CPU", chunk)
    monkeypatch.setattr(chunked, "_SEGMENT_NUMEL", numel)
    assert_chunked_is_reference(op, make_inputs(op, length=133, documents=4))


@both_ops
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 3e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
    ids=["fp32", "bf16", "fp16"],
)
def test_chunked_equals_reference_in_low_precision(op: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(op, length=300, dtype=dtype, documents=3)
    weights = weights_for(inputs)
    got = run(op, inputs, "chunked", weights)
    assert (got["o"].dtype, got["state"].dtype) == (dtype, torch.float32)
    assert_same(got, run(op, inputs, "reference", weights), tolerance)
    exact = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
    }
    exact_o, _ = OPS[op][0](**exact, backend="reference")
    error = (got["o"].double() - exact_o).detach().abs().max() / exact_o.abs().max()
    assert float(error) < tolerance


@both_ops
def test_autocast_does_not_lower_the_precision_of_the_recurrence(op: str) -> None:
    inputs = make_inputs(op, dtype=torch.float32)
    weights = weights_for(inputs)
    for backend in ("chunked", "reference"):
        plain = run(op, inputs, backend, weights)
        assert_same(run(op, inputs, backend, weights, autocast=True), plain, 0.0)
    args = {name: tensor[:, 0].detach() for name, tensor in inputs.items() if name != "initial_state_BHKV"}
    step = OPS[op][1]
    state = inputs["initial_state_BHKV"].detach()
    expected = step(state, *args.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = step(state, *args.values())
    for tensor, other in zip(got, expected, strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_reference_is_the_formula_with_matrices(scale: float | None) -> None:
    # S_t = α (I − β k kᵀ) S + β k vᵀ and (I − β k kᵀ) Diag(α) S + β k vᵀ, with whole matrices, head by head.
    for op in OPS:
        inputs = {name: tensor.detach() for name, tensor in make_inputs(op, batch=1, length=9).items()}
        o_BLHV, end_BHKV = OPS[op][0](**inputs, scale=scale, return_final_state=True, backend="reference")
        for head in range(4):
            state = inputs["initial_state_BHKV"][0, head]
            for t in range(9):
                key, value = inputs["k_BLGK"][0, t, head // 2], inputs["v_BLGV"][0, t, head // 2]
                beta = inputs["beta_BLH"][0, t, head]
                decay = torch.diag(inputs[decay_name(op)][0, t, head].exp().expand(6))
                state = (torch.eye(6) - beta * torch.outer(key, key)) @ decay @ state + beta * torch.outer(key, value)
                read = (1 / math.sqrt(6) if scale is None else scale) * state.T @ inputs["q_BLHK"][0, t, head]
                torch.testing.assert_close(o_BLHV[0, t, head], read, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(end_BHKV[0, head], state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equal_decays_of_all_channels_are_a_decay_per_head(backend: str) -> None:
    inputs = make_inputs("gated", length=200, documents=3)
    per_channel = {name: tensor for name, tensor in inputs.items() if name != "g_BLH"}
    per_channel["g_BLHK"] = inputs["g_BLH"].unsqueeze(-1).expand(2, 200, 4, 6)
    got, _ = kimi_delta_attention(**per_channel, backend=backend)
    expected, _ = gated_delta_rule(**inputs, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@both_ops
@pytest.mark.parametrize("length", LENGTHS)
def test_steps_equal_the_sequence_with_gradients(op: str, length: int) -> None:
    inputs = make_inputs(op, length=length)
    weights = weights_for(inputs)
    state_BHKV, o_steps = inputs["initial_state_BHKV"], []
    steps = [inputs[name].unbind(1) for name in ("q_BLHK", "k_BLGK", "v_BLGV", decay_name(op), "beta_BLH")]
    for args in zip(*steps, strict=True):
        o_BHV, state_BHKV = OPS[op][1](state_BHKV, *args)
        o_steps.append(o_BHV)
    o_BLHV = torch.stack(o_steps, dim=1)
    value = (o_BLHV * weights[0]).sum() + (state_BHKV * weights[1]).sum()
    grads = torch.autograd.grad(value, list(inputs.values()))
    got = {"o": o_BLHV, "state": state_BHKV, **dict(zip(inputs, grads, strict=True))}
    assert_same(got, run(op, inputs, "chunked", weights), EXACT)


@both_ops
def test_step_keeps_its_state_and_dtypes(op: str) -> None:
    inputs = make_inputs(op, length=1, dtype=torch.bfloat16)
    state_BHKV = inputs.pop("initial_state_BHKV").detach().float()
    before = state_BHKV.clone()
    o_BHV, new_state_BHKV = OPS[op][1](state_BHKV, *(tensor[:, 0] for tensor in inputs.values()))
    assert torch.equal(state_BHKV, before)
    assert not torch.equal(new_state_BHKV, before)
    assert (o_BHV.dtype, new_state_BHKV.dtype) == (torch.bfloat16, torch.float32)


@both_ops
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("num_documents", [3, 50])
def test_packed_equals_unpacked(op: str, backend: str, num_documents: int) -> None:
    length = 500 if num_documents == 50 else 150
    inputs = make_inputs(op, batch=1, length=length, documents=num_documents)
    starts_BL = inputs.pop("starts_BL")
    weights = weights_for(inputs)
    packed = run(op, inputs | {"starts_BL": starts_BL}, backend, weights)
    bounds = [0, *(t for t in starts_BL[0].nonzero().flatten().tolist() if t > 0), length]
    outputs, states = [], []
    for begin, end in pairwise(bounds):
        document = {
            name: tensor[:, begin:end] if "L" in name.split("_")[1] else tensor for name, tensor in inputs.items()
        }
        if begin or starts_BL[0, 0]:
            del document["initial_state_BHKV"]
        o_BLHV, state_BHKV = OPS[op][0](**document, return_final_state=True, backend=backend)
        outputs.append(o_BLHV)
        states.append(state_BHKV)
    o_BLHV = torch.cat(outputs, dim=1)
    value = (o_BLHV * weights[0]).sum() + (states[-1] * weights[1]).sum()
    grads = torch.autograd.grad(value, list(inputs.values()), materialize_grads=True)
    assert_same(packed, {"o": o_BLHV, "state": states[-1], **dict(zip(inputs, grads, strict=True))}, EXACT)


@both_ops
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_start_at_the_first_token_wipes_the_initial_state(op: str, backend: str) -> None:
    inputs = make_inputs(op)
    starts_BL = torch.zeros(2, 63, dtype=torch.bool)
    starts_BL[0, 0] = True
    o_BLHV, _ = OPS[op][0](**inputs, starts_BL=starts_BL, backend=backend)
    (grad,) = torch.autograd.grad(o_BLHV.square().sum(), inputs["initial_state_BHKV"])
    assert torch.equal(grad[0], torch.zeros_like(grad[0]))
    assert (grad[1] != 0).any()


@both_ops
def test_a_document_does_not_see_what_came_before_it(op: str) -> None:
    inputs = make_inputs(op, batch=1, length=200)
    starts_BL = torch.zeros(1, 200, dtype=torch.bool)
    starts_BL[0, 77] = True
    changed = inputs | {
        name: torch.cat([torch.randn_like(inputs[name][:, :77]) * scale, inputs[name][:, 77:]], dim=1)
        for name, scale in (("v_BLGV", 1e6), ("k_BLGK", 0.5))
    }
    first, _ = OPS[op][0](**inputs, starts_BL=starts_BL, backend="chunked")
    second, _ = OPS[op][0](**changed, starts_BL=starts_BL, backend="chunked")
    assert torch.equal(first[:, 77:], second[:, 77:])
    assert not torch.equal(first[:, :77], second[:, :77])
    (grad,) = torch.autograd.grad(first[:, 77:].square().sum(), inputs["v_BLGV"])
    assert torch.equal(grad[:, :77], torch.zeros_like(grad[:, :77]))


@both_ops
@pytest.mark.parametrize("cuts", [(1,), (40,), (7, 64, 65, 150)])
def test_a_sequence_in_pieces_equals_the_whole(op: str, cuts: tuple[int, ...]) -> None:
    inputs = make_inputs(op, length=200)
    weights = weights_for(inputs)
    whole = run(op, inputs, "chunked", weights)
    state_BHKV, pieces = inputs["initial_state_BHKV"], []
    for begin, end in pairwise((0, *cuts, 200)):
        piece = {name: tensor[:, begin:end] for name, tensor in inputs.items() if "L" in name.split("_")[1]}
        o_BLHV, state_BHKV = OPS[op][0](
            **piece, initial_state_BHKV=state_BHKV, return_final_state=True, backend="chunked"
        )
        pieces.append(o_BLHV)
    o_BLHV = torch.cat(pieces, dim=1)
    value = (o_BLHV * weights[0]).sum() + (state_BHKV * weights[1]).sum()
    grads = torch.autograd.grad(value, list(inputs.values()))
    assert_same({"o": o_BLHV, "state": state_BHKV, **dict(zip(inputs, grads, strict=True))}, whole, EXACT)


@both_ops
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("g", [-math.inf, -1e30, -1e4, -100.0, -90.0, -1e-30, -0.0], ids=str)
def test_extreme_decays_stay_exact(op: str, g: float, dtype: torch.dtype) -> None:
    inputs = make_inputs(op, length=150, documents=3, dtype=dtype)
    name = decay_name(op)
    ordinary = inputs[name].detach()
    inputs[name] = torch.where(torch.rand_like(ordinary) < 0.4, g, ordinary).requires_grad_()
    assert_chunked_is_reference(op, inputs, 1e-11 if dtype == torch.float64 else 1e-4)


@both_ops
def test_fp32_keeps_its_digits_beside_a_strong_decay(op: str) -> None:
    # A sum of logarithms over the chunk would lose those of the slow decays behind -1e5.
    inputs = {name: tensor.detach() for name, tensor in make_inputs(op, length=64).items()}
    name = decay_name(op)
    inputs[name] = torch.full_like(inputs[name], -1e-4)
    inputs[name][:, 5] = -1e5
    exact, _ = OPS[op][0](**inputs, backend="reference")
    got, _ = OPS[op][0](**{name: tensor.float() for name, tensor in inputs.items()}, backend="chunked")
    assert float((got - exact).abs().max() / exact.abs().max()) < 3e-6


@both_ops
def test_gradcheck_of_every_input(op: str) -> None:
    inputs = make_inputs(op, batch=1, length=70, heads=2, groups=1, key_width=2, value_width=2, documents=3)
    starts_BL = inputs.pop("starts_BL")
    names = list(inputs)

    def scan(*tensors: Tensor) -> Any:
        named = dict(zip(names, tensors, strict=True))
        return OPS[op][0](**named, starts_BL=starts_BL, return_final_state=True, backend="chunked")

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()), fast_mode=True)


@both_ops
def test_strided_inputs_equal_contiguous_ones_and_are_left_as_they_are(op: str) -> None:
    inputs = {name: tensor.detach() for name, tensor in make_inputs(op, documents=3).items()}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    strided = {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in inputs.items()}
    assert not strided["q_BLHK"].is_contiguous()
    got, _ = OPS[op][0](**strided, backend="chunked")
    expected, _ = OPS[op][0](**inputs, backend="chunked")
    assert torch.equal(got, expected)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.timing
@both_ops
def test_chunked_is_several_times_faster_than_the_loop(op: str) -> None:
    # Measured on one core, with the backward pass: 9 times (gated) and 7 times (Kimi); the threshold leaves room for
    # neighbours on the machine.
    inputs = make_inputs(op, 1, 512, 8, 2, 32, 32, torch.float32)
    weights = weights_for(inputs)

    def best_seconds(backend: str, runs: int) -> float:
        seconds = []
        for _ in range(runs):
            begin = time.perf_counter()
            run(op, inputs, backend, weights)
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    ratios = []
    for _ in range(5):
        fast = best_seconds("chunked", 5)
        ratios.append(best_seconds("reference", 2) / fast)
        if ratios[-1] > 3:
            return
    pytest.fail(f"chunked over reference: {ratios}")


@both_ops
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q_BLHK", (2, 63), r"q_BLHK: shape \(2, 63\)"),
        ("q_BLHK", (2, 0, 4, 6), r"q_BLHK: shape \(2, 0, 4, 6\)"),
        ("k_BLGK", (2, 63, 3, 6), r"k_BLGK: 3 groups do not divide 4 heads"),
        ("k_BLGK", (2, 63, 2, 5), r"k_BLGK: shape .* pass \[2, 63, 2, 6\]"),
        ("v_BLGV", (2, 63, 4, 5), r"v_BLGV: shape .* pass \[2, 63, 2, 5\]"),
        ("beta_BLH", (2, 63, 2), r"beta_BLH: shape .* pass \[2, 63, 4\]"),
        ("initial_state_BHKV", (2, 4, 5, 6), r"initial_state_BHKV: shape .* pass \[2, 4, 6, 5\]"),
        ("starts_BL", (2, 62), r"starts_BL: shape .* pass \[2, 63\]"),
    ],
)
def test_a_wrong_shape_is_named_with_its_remedy(op: str, name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPS[op][0](**make_inputs(op) | {name: torch.zeros(shape, dtype=torch.float64)})


def test_a_decay_of_the_other_op_is_named() -> None:
    gated, kimi = make_inputs("gated"), make_inputs("kimi")
    with pytest.raises(ValueError, match=r"g_BLH: shape \(2, 63, 4, 6\); pass \[2, 63, 4\]"):
        gated_delta_rule(**gated | {"g_BLH": kimi["g_BLHK"]})
    with pytest.raises(ValueError, match=r"g_BLHK: shape \(2, 63, 4\); pass \[2, 63, 4, 6\]"):
        kimi_delta_attention(**kimi | {"g_BLHK": gated["g_BLH"]})


@both_ops
def test_other_wrong_arguments_are_named(op: str) -> None:
    inputs = make_inputs(op)
    with pytest.raises(ValueError, match=r"backend: 'fast' is unknown; use one of reference, chunked"):
        OPS[op][0](**inputs, backend="fast")
    with pytest.raises(ValueError, match=r"starts_BL: dtype torch.int64; pass a bool"):
        OPS[op][0](**inputs, starts_BL=torch.zeros(2, 63, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"q_BLHK: dtype torch.int64 is not a float"):
        OPS[op][0](**inputs | {"q_BLHK": torch.zeros(2, 63, 4, 6, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"backend: 'fla'"):
        OPS[op][0](**inputs, backend="fla")
    args = [tensor[:, 0] for name, tensor in inputs.items() if name != "initial_state_BHKV"]
    with pytest.raises(ValueError, match=r"state_BHKV: shape \(2, 4, 5, 6\); pass \[2, 4, 6, 5\]"):
        OPS[op][1](torch.zeros(2, 4, 5, 6), *args)
    with pytest.raises(ValueError, match=r"k_BGK: 3 groups do not divide 4 heads"):
        OPS[op][1](inputs["initial_state_BHKV"], args[0], torch.zeros(2, 3, 6), *args[2:])

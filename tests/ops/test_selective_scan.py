"""The selective scan: reference, chunked form and step agree, with gradients; documents, pieces, wrong arguments."""

from functools import partial

import pytest
import torch
from recurrence_checks import LENGTHS, assert_same, document_by_document, piece_by_piece, with_gradients
from selective_scan_inputs import assert_chunked_is_reference, make_inputs, run, weights_for

from hybridize.ops.selective_scan import selective_scan, selective_scan_step


@pytest.mark.parametrize("documents", [1, 3, 50])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_reference_with_gradients(length: int, documents: int) -> None:
    assert_chunked_is_reference(make_inputs(length=length, documents=min(documents, length + 1)))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"batch": 3, "channels": 8, "states": 1, "heads": 1, "groups": 1, "length": 300}, id="one"),
        pytest.param({"channels": 6, "states": 3, "heads": 6, "groups": 1, "length": 131}, id="head per channel"),
        pytest.param({"channels": 12, "states": 5, "heads": 4, "groups": 4, "length": 65}, id="groups are heads"),
    ],
)
def test_chunked_equals_reference_at_other_shapes(shape: dict[str, int]) -> None:
    assert_chunked_is_reference(make_inputs(**shape, documents=3))


@pytest.mark.parametrize("without", ["D_D", "dt_bias_D", "z_BLD", "initial_state_BDN"])
def test_chunked_equals_reference_without_an_option(without: str) -> None:
    inputs = make_inputs()
    del inputs[without]
    assert_chunked_is_reference(inputs)


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
    got = with_gradients((torch.stack(y_steps, dim=1), state_BDN), inputs, weights)
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
    unpacked = document_by_document(partial(selective_scan, backend=backend), inputs, starts_BL, "initial_state_BDN")
    assert_same(packed, with_gradients(unpacked, inputs, weights, materialize_grads=True), 1e-12)


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
    pieces = piece_by_piece(partial(selective_scan, backend="chunked"), inputs, (0, *cuts, 200), "initial_state_BDN")
    assert_same(with_gradients(pieces, inputs, weights), run(inputs, "chunked", weights), 1e-12)


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

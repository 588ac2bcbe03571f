"""State space duality: reference, chunked form and step agree, with gradients; documents, pieces, wrong arguments."""

from functools import partial

import pytest
import torch
from recurrence_checks import LENGTHS, assert_same, document_by_document, over_time, piece_by_piece, with_gradients
from ssd_inputs import assert_chunked_is_reference, make_inputs, run, weights_for

from hybridize.ops.ssd import ssd, ssd_step


@pytest.mark.parametrize("documents", [1, 3, 50])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_reference_with_gradients(length: int, documents: int) -> None:
    assert_chunked_is_reference(make_inputs(length=length, documents=min(documents, length + 1)))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"heads": 1, "groups": 1, "width": 1, "states": 1, "length": 300}, id="ones"),
        pytest.param({"heads": 4, "groups": 4, "width": 3, "states": 16, "length": 129}, id="groups are heads"),
        pytest.param({"batch": 3, "heads": 8, "groups": 1, "width": 16, "states": 2, "length": 64}, id="one group"),
    ],
)
def test_chunked_equals_reference_at_other_shapes(shape: dict[str, int]) -> None:
    assert_chunked_is_reference(make_inputs(**shape, documents=3))


@pytest.mark.parametrize("without", ["D_H", "dt_bias_H", "initial_state_BHPN"])
def test_chunked_equals_reference_without_an_option(without: str) -> None:
    inputs = make_inputs()
    del inputs[without]
    assert_chunked_is_reference(inputs)


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
    got = with_gradients((torch.stack(y_steps, dim=1), state_BHPN), inputs, weights)
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
    unpacked = document_by_document(partial(ssd, backend=backend), inputs, starts_BL, "initial_state_BHPN")
    assert_same(packed, with_gradients(unpacked, inputs, weights, materialize_grads=True), 1e-12)


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
    pieces = piece_by_piece(partial(ssd, backend="chunked"), inputs, (0, *cuts, 200), "initial_state_BHPN")
    assert_same(with_gradients(pieces, inputs, weights), run(inputs, "chunked", weights), 1e-12)


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

"""The state of the mixers with a delta rule: decoding, chunked prefill, packed documents, padding, windows."""

from itertools import pairwise

import pytest
import torch
from delta_rule_mixer_inputs import EXACT, HIDDEN, both_kinds, make_full_mixer, make_hidden, make_mixer
from torch import Tensor

from hybridize.mixers.delta_rule import DeltaRuleMixer


def assert_pieces_equal_the_whole(mixer: DeltaRuleMixer, hidden_BLE: Tensor, bounds: list[int]) -> None:
    whole, end = mixer(hidden_BLE, return_state=True)
    state, pieces = None, []
    for begin, stop in pairwise(bounds):
        out, state = mixer(hidden_BLE[:, begin:stop], state=state, return_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)
    torch.testing.assert_close(state, end, **EXACT)
    shapes = {name: tuple(getattr(state, name).shape) for name in ("conv", "ssm")}
    assert shapes == mixer.state_shapes(len(hidden_BLE))


@both_kinds
@pytest.mark.parametrize("first", [1, 2, 30])
def test_decode_steps_equal_the_whole_sequence(kind: str, first: int) -> None:
    assert_pieces_equal_the_whole(make_full_mixer(kind), make_hidden(40), [0, *range(first, 41)])


@both_kinds
@pytest.mark.parametrize("cuts", [(1,), (2, 3, 5), (33,), (10, 20, 21)])
def test_chunked_prefill_equals_the_whole_sequence(kind: str, cuts: tuple[int, ...]) -> None:
    assert_pieces_equal_the_whole(make_full_mixer(kind), make_hidden(40), [0, *cuts, 40])


def packed_starts(lengths: list[int]) -> Tensor:
    starts_BL = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts_BL[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    return starts_BL


@both_kinds
@pytest.mark.parametrize("lengths", [[7, 1, 2, 3, 80, 4], [1] * 9, [50, 50]], ids=str)
def test_packed_documents_equal_separate_ones_with_gradients(kind: str, lengths: list[int]) -> None:
    mixer = make_full_mixer(kind)
    documents = [make_hidden(length, batch=1) for length in lengths]
    weights = [torch.randn_like(document) for document in documents]
    packed, end = mixer(torch.cat(documents, dim=1), starts_BL=packed_starts(lengths), return_state=True)
    outs = [mixer(document, return_state=True) for document in documents]
    torch.testing.assert_close(packed, torch.cat([out for out, _ in outs], dim=1), **EXACT)
    torch.testing.assert_close(end, outs[-1][1], **EXACT)
    parameters = list(mixer.parameters())
    got = torch.autograd.grad((packed * torch.cat(weights, dim=1)).sum(), parameters)
    value = sum((out * weight).sum() for (out, _), weight in zip(outs, weights, strict=True))
    torch.testing.assert_close(got, torch.autograd.grad(value, parameters), rtol=1e-8, atol=1e-9)


@both_kinds
def test_no_gradient_crosses_a_document_boundary(kind: str) -> None:
    mixer = make_full_mixer(kind)
    hidden_BLE = make_hidden(30, batch=1).requires_grad_()
    out, _ = mixer(hidden_BLE, starts_BL=packed_starts([13, 17]))
    (grad,) = torch.autograd.grad(out[:, 13:].square().sum(), hidden_BLE)
    assert torch.equal(grad[:, :13], torch.zeros_like(grad[:, :13]))
    assert (grad[:, 13:] != 0).all()


@both_kinds
@pytest.mark.parametrize("length", [1, 5])
def test_a_start_forgets_the_given_state(kind: str, length: int) -> None:
    mixer = make_full_mixer(kind)
    _, state = mixer(make_hidden(11), return_state=True)
    hidden_BLE = make_hidden(length)
    starts_BL = torch.zeros(2, length, dtype=torch.bool)
    starts_BL[1, 0] = True
    out, end = mixer(hidden_BLE, starts_BL=starts_BL, state=state, return_state=True)
    fresh, fresh_end = mixer(hidden_BLE, return_state=True)
    torch.testing.assert_close(out[1], fresh[1], **EXACT)
    assert not torch.allclose(out[0], fresh[0])
    for got, expected in zip(end, fresh_end, strict=True):
        torch.testing.assert_close(got[1], expected[1], **EXACT)


@both_kinds
@pytest.mark.parametrize("num_padding", [1, 3, 20])
def test_left_padding_changes_nothing(kind: str, num_padding: int) -> None:
    mixer = make_full_mixer(kind)
    long, short = make_hidden(25, batch=1), make_hidden(25 - num_padding, batch=1)
    rubbish = torch.full((1, num_padding, HIDDEN), float("nan"), dtype=torch.float64)
    batch = torch.cat([long, torch.cat([rubbish, short], dim=1)])
    valid_BL = torch.ones(2, 25, dtype=torch.bool)
    valid_BL[1, :num_padding] = False
    out, state = mixer(batch, valid_BL=valid_BL, return_state=True)
    for row, alone in ((0, long), (1, short)):
        expected, expected_state = mixer(alone, return_state=True)
        torch.testing.assert_close(out[row, -alone.shape[1] :], expected[0], **EXACT)
        for got, want in zip(state, expected_state, strict=True):
            torch.testing.assert_close(got[row], want[0], **EXACT)
    grads = torch.autograd.grad(out[valid_BL].sum(), list(mixer.parameters()))
    assert all(torch.isfinite(grad).all() for grad in grads)


@both_kinds
def test_a_row_of_padding_leaves_the_state_at_zero(kind: str) -> None:
    mixer = make_full_mixer(kind)
    _, state = mixer(make_hidden(6), valid_BL=torch.zeros(2, 6, dtype=torch.bool), return_state=True)
    for tensor in state:
        assert torch.equal(tensor, torch.zeros_like(tensor))


@both_kinds
def test_padding_lets_the_state_of_the_recurrence_be(kind: str) -> None:
    mixer = make_full_mixer(kind)
    hidden_BLE = make_hidden(12)
    valid_BL = torch.ones(2, 12, dtype=torch.bool)
    valid_BL[1, 7:] = False
    out, state = mixer(hidden_BLE, valid_BL=valid_BL, return_state=True)
    expected, end = mixer(hidden_BLE[:, :7], return_state=True)
    torch.testing.assert_close(out[1, :7], expected[1], **EXACT)
    torch.testing.assert_close(state.ssm[1], end.ssm[1], **EXACT)


@both_kinds
def test_a_padded_decode_step_leaves_the_state(kind: str) -> None:
    mixer = make_full_mixer(kind)
    _, state = mixer(make_hidden(6), return_state=True)
    valid_BL = torch.tensor([[True], [False]])
    hidden_BLE = make_hidden(1)
    _, new = mixer(hidden_BLE, valid_BL=valid_BL, state=state, return_state=True)
    _, free = mixer(hidden_BLE, state=state, return_state=True)
    for got, before, moved in zip(new, state, free, strict=True):
        torch.testing.assert_close(got[1], before[1], **EXACT)
        torch.testing.assert_close(got[0], moved[0], **EXACT)
        assert not torch.allclose(got[0], before[0])


@both_kinds
def test_the_state_given_is_left_as_it_is(kind: str) -> None:
    mixer = make_full_mixer(kind)
    _, state = mixer(make_hidden(6), return_state=True)
    before = [tensor.clone() for tensor in state]
    for length in (1, 4):
        mixer(make_hidden(length), state=state, return_state=True)
    for tensor, copy in zip(state, before, strict=True):
        assert torch.equal(tensor, copy)


@both_kinds
def test_conv_state_holds_the_last_groups_not_their_repetition(kind: str) -> None:
    mixer = make_mixer(kind)
    hidden_BLE = make_hidden(2)
    _, state = mixer(hidden_BLE, return_state=True)
    assert torch.equal(state.conv[..., :2], torch.zeros(2, 48, 2, dtype=torch.float64))
    inputs = torch.cat([mixer.q_proj(hidden_BLE), mixer.k_proj(hidden_BLE), mixer.v_proj(hidden_BLE)], dim=-1)
    torch.testing.assert_close(state.conv[..., 2:], inputs.transpose(1, 2), **EXACT)
    assert mixer.state_bytes(torch.bfloat16) == 48 * 4 * 2 + 4 * 6 * 6 * 4

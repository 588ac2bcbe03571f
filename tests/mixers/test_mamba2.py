"""The Mamba-2 mixer: the paper's formula, packing, padding, state, initialisation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from hybridize.mixers import Mamba2Mixer, MixerState, build_mixer
from hybridize.spec.mixers import AttentionGeometry, Mamba2Spec

HIDDEN = 20
GEOMETRY = AttentionGeometry(hidden_size=HIDDEN, num_heads=6, num_kv_heads=2, head_dim=4)
EXACT = {"rtol": 1e-11, "atol": 1e-12}
BARE: dict[str, Any] = {"conv_activation": "none", "gate_norm": False}
FULL: dict[str, Any] = {"qkv_bias": True, "output_bias": True, "qk_norm": "head", "norm_eps": 0.1, "gate_bias": True}
WIDE: dict[str, Any] = {**FULL, "qk_norm": "width", "head_dim": 3, "num_heads": 6, "num_groups": 2}
VARIANTS = [{}, BARE, FULL, WIDE]
NAMES = ["plain", "bare", "full", "wide"]


def make_mixer(dtype: torch.dtype = torch.float64, **changes: Any) -> Mamba2Mixer:
    spec = Mamba2Spec(**changes).resolve(GEOMETRY)
    mixer = build_mixer(spec, HIDDEN, initializer_range=0.5)
    assert isinstance(mixer, Mamba2Mixer)
    with torch.no_grad():  # away from the special values of the constructor
        for name, parameter in mixer.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name or name == "A_log" else 1.0))
    return mixer.to(dtype)


def make_hidden(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def paper(mixer: Mamba2Mixer, hidden_LE: Tensor) -> Tensor:
    """One document, token by token and head by head, from the formula alone."""
    spec, weights = mixer.spec, mixer.state_dict()
    heads, groups, width, states = spec.num_heads, spec.num_groups, spec.head_dim, spec.state_size
    z_rows, rest, dt_rows = (hidden_LE @ weights["in_proj.weight"].t()).split(
        [heads * width, groups * (width + states) + heads * states, heads], dim=-1
    )
    rest = rest + weights.get("qkv_bias", 0.0)
    if spec.qk_norm != "none":
        rest = rest.clone()
        first = groups * width
        for name, count in (("k_norm.weight", groups), ("q_norm.weight", heads)):
            size = states if spec.qk_norm == "head" else states * count
            for begin in range(first, first + states * count, size):
                for t in range(len(rest)):
                    rest[t, begin : begin + size] = rms(rest[t, begin : begin + size], weights[name], spec.norm_eps)
            first += states * count
    taps = spec.conv_kernel
    padded = torch.cat([rest.new_zeros(taps - 1, rest.shape[1]), rest])
    kernel = weights["conv1d.weight"][:, 0].t()
    conv = torch.stack([(padded[t : t + taps] * kernel).sum(0) for t in range(len(rest))]) + weights["conv1d.bias"]
    if spec.conv_activation == "silu":
        conv = conv * torch.sigmoid(conv)
    out = torch.zeros(len(rest), heads * width, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // groups)
        rows = slice(head * width, (head + 1) * width)
        state = torch.zeros(width, states, dtype=torch.float64)
        for t in range(len(rest)):
            x = conv[t, group * width : (group + 1) * width]
            b = conv[t, groups * width + group * states :][:states]
            c = conv[t, groups * (width + states) + head * states :][:states]
            step = torch.log1p(torch.exp(dt_rows[t, head] + weights["dt_bias"][head]))
            state = torch.exp(-step * torch.exp(weights["A_log"][head])) * state + step * torch.outer(x, b)
            y = state @ c + weights["D"][head] * x
            gate = z_rows[t, rows]
            if spec.gate_bias:
                gate = gate + weights["gate_bias"][rows]
            y = y * silu(gate)
            out[t, rows] = rms(y, weights["norm.weight"][rows], spec.norm_eps) if spec.gate_norm else y
    return out @ weights["out_proj.weight"].t() + weights.get("out_proj.bias", 0.0)


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
@pytest.mark.parametrize("length", [1, 3, 41])
def test_forward_equals_the_paper(length: int, changes: dict[str, Any]) -> None:
    mixer = make_mixer(**changes)
    hidden_BLE = make_hidden(length)
    out_BLE, state = mixer(hidden_BLE)
    assert state is None
    expected = torch.stack([paper(mixer, row) for row in hidden_BLE])
    torch.testing.assert_close(out_BLE.detach(), expected, **EXACT)


def test_parameters_have_their_names_and_shapes() -> None:
    plain = {name: tuple(tensor.shape) for name, tensor in make_mixer().state_dict().items()}
    assert plain == {
        "in_proj.weight": (24 + 8 + 8 + 24 + 6, HIDDEN),
        "conv1d.weight": (40, 1, 4),
        "conv1d.bias": (40,),
        "A_log": (6,),
        "D": (6,),
        "dt_bias": (6,),
        "norm.weight": (24,),
        "out_proj.weight": (HIDDEN, 24),
    }
    full = {name: tuple(tensor.shape) for name, tensor in make_mixer(**FULL).state_dict().items()}
    assert full == plain | {
        "qkv_bias": (40,),
        "gate_bias": (24,),
        "q_norm.weight": (4,),
        "k_norm.weight": (4,),
        "out_proj.bias": (HIDDEN,),
    }
    wide = make_mixer(**WIDE).state_dict()
    assert (wide["q_norm.weight"].shape, wide["k_norm.weight"].shape) == ((24,), (8,))
    assert "norm.weight" not in make_mixer(gate_norm=False).state_dict()


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
@pytest.mark.parametrize("first", [1, 2, 70])
def test_decode_steps_equal_the_whole_sequence(first: int, changes: dict[str, Any]) -> None:
    mixer = make_mixer(**changes)
    hidden_BLE = make_hidden(80)
    whole, end = mixer(hidden_BLE, return_state=True)
    out, state = mixer(hidden_BLE[:, :first], return_state=True)
    pieces = [out]
    for t in range(first, 80):
        out, state = mixer(hidden_BLE[:, t : t + 1], state=state, return_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)
    torch.testing.assert_close(state, end, **EXACT)


@pytest.mark.parametrize("cuts", [(1,), (2, 3, 5), (70,), (10, 20, 21)], ids=str)
def test_chunked_prefill_equals_the_whole_sequence(cuts: tuple[int, ...]) -> None:
    mixer = make_mixer(**FULL)
    hidden_BLE = make_hidden(80)
    whole, end = mixer(hidden_BLE, return_state=True)
    state, pieces = None, []
    for begin, stop in zip((0, *cuts), (*cuts, 80), strict=True):
        out, state = mixer(hidden_BLE[:, begin:stop], state=state, return_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)
    torch.testing.assert_close(state, end, **EXACT)


def packed_starts(lengths: list[int]) -> Tensor:
    starts_BL = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts_BL[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    return starts_BL


@pytest.mark.parametrize("changes", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("lengths", [[7, 1, 2, 3, 80, 4], [1] * 9, [50, 50]], ids=str)
def test_packed_documents_equal_separate_ones_with_gradients(lengths: list[int], changes: dict[str, Any]) -> None:
    mixer = make_mixer(**changes)
    documents = [make_hidden(length, batch=1) for length in lengths]
    weights = [torch.randn_like(document) for document in documents]
    packed, end = mixer(torch.cat(documents, dim=1), starts_BL=packed_starts(lengths), return_state=True)
    outs = [mixer(document, return_state=True) for document in documents]
    torch.testing.assert_close(packed, torch.cat([out for out, _ in outs], dim=1), **EXACT)
    torch.testing.assert_close(end, outs[-1][1], **EXACT)
    parameters = list(mixer.parameters())
    got = torch.autograd.grad((packed * torch.cat(weights, dim=1)).sum(), parameters)
    value = sum((out * weight).sum() for (out, _), weight in zip(outs, weights, strict=True))
    torch.testing.assert_close(got, torch.autograd.grad(value, parameters), rtol=1e-9, atol=1e-9)


def test_no_gradient_crosses_a_document_boundary() -> None:
    mixer = make_mixer()
    hidden_BLE = make_hidden(30, batch=1).requires_grad_()
    out, _ = mixer(hidden_BLE, starts_BL=packed_starts([13, 17]))
    (grad,) = torch.autograd.grad(out[:, 13:].square().sum(), hidden_BLE)
    assert torch.equal(grad[:, :13], torch.zeros_like(grad[:, :13]))
    assert (grad[:, 13:] != 0).all()


@pytest.mark.parametrize("length", [1, 5])
def test_a_start_forgets_the_given_state(length: int) -> None:
    mixer = make_mixer(**FULL)
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


@pytest.mark.parametrize("changes", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("num_padding", [1, 3, 20])
def test_left_padding_changes_nothing(num_padding: int, changes: dict[str, Any]) -> None:
    mixer = make_mixer(**changes)
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


def test_a_row_of_padding_leaves_the_state_at_zero() -> None:
    mixer = make_mixer(**FULL)
    _, state = mixer(make_hidden(6), valid_BL=torch.zeros(2, 6, dtype=torch.bool), return_state=True)
    for tensor in state:
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_right_padding_changes_no_output_before_it() -> None:
    mixer = make_mixer()
    hidden_BLE = make_hidden(12)
    valid_BL = torch.ones(2, 12, dtype=torch.bool)
    valid_BL[1, 7:] = False
    out, state = mixer(hidden_BLE, valid_BL=valid_BL, return_state=True)
    expected, end = mixer(hidden_BLE[:, :7], return_state=True)
    torch.testing.assert_close(out[1, :7], expected[1], **EXACT)
    torch.testing.assert_close(state.ssm[1], end.ssm[1], **EXACT)


def test_a_padded_decode_step_leaves_the_state() -> None:
    mixer = make_mixer(**FULL)
    _, state = mixer(make_hidden(6), return_state=True)
    before = [tensor.clone() for tensor in state]
    valid_BL = torch.tensor([[True], [False]])
    hidden_BLE = make_hidden(1)
    _, new = mixer(hidden_BLE, valid_BL=valid_BL, state=state, return_state=True)
    _, free = mixer(hidden_BLE, state=state, return_state=True)
    for got, old, moved, copy in zip(new, state, free, before, strict=True):
        torch.testing.assert_close(got[1], old[1], **EXACT)
        torch.testing.assert_close(got[0], moved[0], **EXACT)
        assert not torch.allclose(got[0], old[0])
        assert torch.equal(old, copy)  # the state given is left as it is


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_tracks_fp64_with_an_fp32_state(dtype: torch.dtype) -> None:
    mixer = make_mixer(dtype)
    exact = Mamba2Mixer(mixer.spec, HIDDEN).double()
    exact.load_state_dict(mixer.state_dict())
    hidden_BLE = make_hidden(200).to(dtype)
    expected, _ = exact(hidden_BLE.double())
    out, state = mixer(hidden_BLE, return_state=True)
    assert (out.dtype, state.conv.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    error = (out.double() - expected).detach().square().mean() / expected.detach().square().mean()
    assert float(error) < 0.05**2
    step, state = mixer(hidden_BLE[:, :1], state=state, return_state=True)
    assert (step.dtype, state.conv.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    out.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in mixer.parameters())


def test_decays_are_computed_in_fp32_in_a_bf16_module_and_under_autocast() -> None:
    seen: dict[str, torch.dtype] = {}

    def spy(x_BLGP: Tensor, dt_BLH: Tensor, A_H: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        seen.update(A=A_H.dtype, D=options["D_H"].dtype, bias=options["dt_bias_H"].dtype)
        return x_BLGP.repeat_interleave(3, dim=2), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybridize.mixers.mamba2.ssd", spy)
        for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
            seen.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out, _ = make_mixer(dtype)(make_hidden(3).to(dtype))
            assert out.dtype == torch.bfloat16
            assert seen == dict.fromkeys(("A", "D", "bias"), torch.float32)


def test_reset_parameters_is_the_constructor_of_the_paper() -> None:
    geometry = AttentionGeometry(hidden_size=64, num_heads=400, num_kv_heads=100, head_dim=2, qkv_bias=True)
    spec = Mamba2Spec(dt_min=1e-5, dt_max=0.2, decay_min=2, decay_max=8, gate_bias=True).resolve(geometry)
    mixer = Mamba2Mixer(spec, 64, initializer_range=0.03)
    decays = mixer.A_log.detach().exp()
    assert 2 <= float(decays.min()) < 2.3
    assert 7.7 < float(decays.max()) <= 8.0001
    assert float(decays.mean()) == pytest.approx(5, abs=0.5)
    steps = torch.nn.functional.softplus(mixer.dt_bias.detach().double())
    assert 0.99e-4 < float(steps.min()) < 2e-4  # the floor, above dt_min
    assert 0.1 < float(steps.max()) <= 0.2001
    assert float(steps.log().median()) == pytest.approx(math.log(1e-5 * 0.2) / 2, abs=1.1)
    for ones in (mixer.D, mixer.norm.weight):
        assert torch.equal(ones, torch.ones_like(ones))
    for zeros in (mixer.qkv_bias, mixer.gate_bias):
        assert torch.equal(zeros, torch.zeros_like(zeros))
    for projection in (mixer.in_proj, mixer.out_proj):
        assert projection.bias is None
        assert float(projection.weight.detach().std()) == pytest.approx(0.03, rel=0.1)


def test_initialisation_follows_the_generator_or_the_global_seed() -> None:
    mixer = make_mixer(torch.float32, **FULL)

    def reset(seed: int, globally: bool) -> list[Tensor]:
        if globally:
            torch.manual_seed(seed)
            mixer.reset_parameters()
        else:
            before = torch.get_rng_state()
            mixer.reset_parameters(torch.Generator().manual_seed(seed))
            assert torch.equal(before, torch.get_rng_state())
        return [parameter.detach().clone() for parameter in mixer.parameters()]

    for globally in (True, False):
        first, again, other = reset(1, globally), reset(1, globally), reset(2, globally)
        assert all(map(torch.equal, first, again))
        assert not all(map(torch.equal, first, other))


def test_building_on_the_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        mixer = make_mixer(torch.float32, **FULL)
    assert all(parameter.is_meta for parameter in mixer.parameters())
    mixer.to_empty(device="cpu").reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in mixer.parameters())
    assert torch.isfinite(mixer(make_hidden(5).float())[0]).all()


def test_state_size_is_told_without_running() -> None:
    mixer = make_mixer(torch.bfloat16)
    _, state = mixer(make_hidden(3, batch=5).bfloat16(), return_state=True)
    assert mixer.state_shapes(5) == {name: tuple(getattr(state, name).shape) for name in MixerState._fields}
    assert mixer.state_bytes(torch.bfloat16, 5) == sum(t.numel() * t.itemsize for t in state)


def test_wrong_arguments_are_named_with_their_remedy() -> None:
    mixer = make_mixer()
    hidden_BLE = make_hidden(4)
    with pytest.raises(ValueError, match=r"hidden_BLE: shape \(2, 4, 3\); pass \[batch, length, 20\]"):
        mixer(hidden_BLE[..., :3])
    with pytest.raises(ValueError, match=r"valid_BL: torch.int64 .* pass a bool tensor of shape \[2, 4\]"):
        mixer(hidden_BLE, valid_BL=torch.ones(2, 4, dtype=torch.int64))
    _, state = mixer(hidden_BLE[:1], return_state=True)
    with pytest.raises(ValueError, match=r"state.conv: shape \(1, 40, 4\); pass \[2, 40, 4\]"):
        mixer(hidden_BLE, state=state)
    with pytest.raises(ValueError, match=r"open sizes; call spec.resolve"):
        build_mixer(Mamba2Spec(), HIDDEN)

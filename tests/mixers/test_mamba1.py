"""The Mamba-1 mixer: the paper's formula, packing, padding, state, initialisation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.mixers import Mamba1Mixer, MixerState, build_mixer
from hybridize.spec.mixers import AttentionGeometry, AttentionSpec, Mamba1Spec

HIDDEN = 20
GEOMETRY = AttentionGeometry(hidden_size=HIDDEN, num_heads=6, num_kv_heads=2, head_dim=4)
EXACT = {"rtol": 1e-11, "atol": 1e-12}
FULL: dict[str, Any] = {"qkv_bias": True, "output_bias": True, "qk_norm": "head", "norm_eps": 0.1, "gate_bias": True}
WIDE: dict[str, Any] = {**FULL, "qk_norm": "width"}
VARIANTS, NAMES = [{}, FULL, WIDE], ["plain", "full", "wide"]


def make_mixer(dtype: torch.dtype = torch.float64, **changes: Any) -> Mamba1Mixer:
    spec = Mamba1Spec(**{"state_size": 4, "dt_rank": 3, **changes}).resolve(GEOMETRY)
    mixer = build_mixer(spec, HIDDEN, initializer_range=0.5)
    assert isinstance(mixer, Mamba1Mixer)
    with torch.no_grad():  # away from the special values of the constructor
        mixer.A_log.add_(torch.randn_like(mixer.A_log) * 0.3)
        mixer.D.add_(torch.randn_like(mixer.D))
        mixer.dt_proj.bias.add_(torch.randn_like(mixer.dt_proj.bias))
        for parameter in (mixer.qkv_bias, mixer.gate_bias, mixer.out_proj.bias):
            if parameter is not None:
                parameter.add_(torch.randn_like(parameter))
        for norm in (mixer.q_norm, mixer.k_norm):
            if norm is not None:
                norm.weight.add_(torch.randn_like(norm.weight) * 0.3)
    return mixer.to(dtype)


def make_hidden(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64)


def norm_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """An RMS norm, with eps 0.1, of as many channels at a time as there are weights."""
    parts = [part / (part.square().mean(-1, keepdim=True) + 0.1).sqrt() for part in rows.split(len(weight), dim=-1)]
    return torch.cat([part * weight for part in parts], dim=-1)


def paper(mixer: Mamba1Mixer, hidden_LE: Tensor, double_bias: bool = False) -> Tensor:
    """One document, token by token and head by head, from the paper's formula alone."""
    states, heads = mixer.A_log.shape[1], mixer.D.shape[0] // mixer.A_log.shape[1]
    groups = (mixer.in_proj.out_features - 2 * mixer.D.shape[0]) // 2 // states
    d_inner, d_xb = heads * states, groups * states
    weights = mixer.state_dict()
    z, x, b, c = mixer.in_proj(hidden_LE).split([d_inner, d_xb, d_xb, d_inner], dim=-1)
    z = z + weights.get("gate_bias", 0.0)
    if "qkv_bias" in weights:
        x_bias, b_bias, c_bias = weights["qkv_bias"].split([d_xb, d_xb, d_inner])
        x, b, c = x + x_bias, b + b_bias, c + c_bias
    if "q_norm.weight" in weights:
        b, c = (norm_rows(rows, weights[name]) for rows, name in ((b, "k_norm.weight"), (c, "q_norm.weight")))
    x = torch.cat([x[:, (h * groups // heads) * states :][:, :states] for h in range(heads)], dim=-1)
    taps = mixer.conv1d.weight.shape[-1]
    padded = torch.cat([x.new_zeros(taps - 1, d_inner), x]).t().unsqueeze(0)
    conv = torch.nn.functional.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=d_inner)
    x = torch.nn.functional.silu(conv[0].t())
    dt = mixer.dt_proj(mixer.dt_in_proj(hidden_LE))
    if double_bias:
        dt = dt + mixer.dt_proj.bias
    step = torch.log1p(torch.exp(dt))
    y = torch.zeros_like(x)
    for h in range(heads):
        channels = slice(h * states, (h + 1) * states)
        group = slice((h * groups // heads) * states, (h * groups // heads + 1) * states)
        decay_A = -torch.exp(mixer.A_log[channels])
        state = x.new_zeros(states, states)
        for t in range(len(x)):
            delta = step[t, channels, None]
            state = torch.exp(delta * decay_A) * state + delta * x[t, channels, None] * b[t, group]
            y[t, channels] = state @ c[t, channels]
    y = y + mixer.D * x
    return mixer.out_proj(y * torch.nn.functional.silu(z))


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
@pytest.mark.parametrize("mode", ["single", "double"])
@pytest.mark.parametrize("length", [1, 3, 41])
def test_forward_equals_the_paper(length: int, mode: str, changes: dict[str, Any]) -> None:
    mixer = make_mixer(dt_bias_mode=mode, **changes)
    hidden_BLE = make_hidden(length)
    out_BLE, state = mixer(hidden_BLE)
    assert state is None
    with torch.no_grad():
        expected = torch.stack([paper(mixer, row, mode == "double") for row in hidden_BLE])
    torch.testing.assert_close(out_BLE, expected, **EXACT)


def test_dt_bias_modes_differ() -> None:
    single = make_mixer()
    double = Mamba1Mixer(single.spec.model_copy(update={"dt_bias_mode": "double"}), HIDDEN).double()
    double.load_state_dict(single.state_dict())
    hidden_BLE = make_hidden(9)
    assert not torch.allclose(single(hidden_BLE)[0], double(hidden_BLE)[0])


def test_parameters_have_the_published_names_and_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make_mixer().state_dict().items()}
    assert shapes == {
        "in_proj.weight": (2 * 24 + 2 * 8, HIDDEN),
        "dt_in_proj.weight": (3, HIDDEN),
        "dt_proj.weight": (24, 3),
        "dt_proj.bias": (24,),
        "conv1d.weight": (24, 1, 4),
        "conv1d.bias": (24,),
        "A_log": (24, 4),
        "D": (24,),
        "out_proj.weight": (HIDDEN, 24),
    }
    full = {name: tuple(tensor.shape) for name, tensor in make_mixer(**FULL).state_dict().items()}
    assert full == shapes | {
        "qkv_bias": (2 * 8 + 24,),
        "gate_bias": (24,),
        "q_norm.weight": (4,),
        "k_norm.weight": (4,),
        "out_proj.bias": (HIDDEN,),
    }
    wide = make_mixer(**WIDE).state_dict()
    assert (wide["q_norm.weight"].shape, wide["k_norm.weight"].shape) == ((24,), (8,))


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
@pytest.mark.parametrize("first", [1, 2, 30])
def test_decode_steps_equal_the_whole_sequence(first: int, changes: dict[str, Any]) -> None:
    mixer = make_mixer(**changes)
    hidden_BLE = make_hidden(40)
    whole, end = mixer(hidden_BLE, return_state=True)
    out, state = mixer(hidden_BLE[:, :first], return_state=True)
    pieces = [out]
    for t in range(first, 40):
        out, state = mixer(hidden_BLE[:, t : t + 1], state=state, return_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)
    torch.testing.assert_close(state, end, **EXACT)


@pytest.mark.parametrize("cuts", [(1,), (2, 3, 5), (33,), (10, 20, 21)])
def test_chunked_prefill_equals_the_whole_sequence(cuts: tuple[int, ...]) -> None:
    mixer = make_mixer()
    hidden_BLE = make_hidden(40)
    whole, end = mixer(hidden_BLE, return_state=True)
    state, pieces = None, []
    for begin, stop in zip((0, *cuts), (*cuts, 40), strict=True):
        out, state = mixer(hidden_BLE[:, begin:stop], state=state, return_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)
    torch.testing.assert_close(state, end, **EXACT)


def packed_starts(lengths: list[int]) -> Tensor:
    starts_BL = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts_BL[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    return starts_BL


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
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
    torch.testing.assert_close(got, torch.autograd.grad(value, parameters), rtol=1e-9, atol=1e-10)


def test_no_gradient_crosses_a_document_boundary() -> None:
    mixer = make_mixer()
    hidden_BLE = make_hidden(30, batch=1).requires_grad_()
    out, _ = mixer(hidden_BLE, starts_BL=packed_starts([13, 17]))
    (grad,) = torch.autograd.grad(out[:, 13:].square().sum(), hidden_BLE)
    assert torch.equal(grad[:, :13], torch.zeros_like(grad[:, :13]))
    assert (grad[:, 13:] != 0).all()


@pytest.mark.parametrize("length", [1, 5])
def test_a_start_forgets_the_given_state(length: int) -> None:
    mixer = make_mixer()
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


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
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
    mixer = make_mixer()
    _, state = mixer(make_hidden(6), return_state=True)
    valid_BL = torch.tensor([[True], [False]])
    hidden_BLE = make_hidden(1)
    _, new = mixer(hidden_BLE, valid_BL=valid_BL, state=state, return_state=True)
    _, free = mixer(hidden_BLE, state=state, return_state=True)
    for got, before, moved in zip(new, state, free, strict=True):
        torch.testing.assert_close(got[1], before[1], **EXACT)
        torch.testing.assert_close(got[0], moved[0], **EXACT)
        assert not torch.allclose(got[0], before[0])


def test_the_state_given_is_left_as_it_is() -> None:
    mixer = make_mixer()
    _, state = mixer(make_hidden(6), return_state=True)
    before = [tensor.clone() for tensor in state]
    for length in (1, 4):
        mixer(make_hidden(length), state=state, return_state=True)
    for tensor, copy in zip(state, before, strict=True):
        assert torch.equal(tensor, copy)


def test_conv_state_holds_the_last_inputs_oldest_first() -> None:
    mixer = make_mixer()
    hidden_BLE = make_hidden(2)
    _, state = mixer(hidden_BLE, return_state=True)
    x_BLX = mixer.in_proj(hidden_BLE)[..., 24:32]
    assert torch.equal(state.conv[..., :2], torch.zeros(2, 24, 2, dtype=torch.float64))
    for channel in range(24):  # three heads of four channels per group
        raw = (channel // 12) * 4 + channel % 4
        torch.testing.assert_close(state.conv[:, channel, 2:], x_BLX[..., raw], **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_tracks_fp64_with_an_fp32_state(dtype: torch.dtype) -> None:
    mixer = make_mixer(dtype)
    exact = Mamba1Mixer(mixer.spec, HIDDEN).double()
    exact.load_state_dict(mixer.state_dict())
    hidden_BLE = make_hidden(200).to(dtype)
    expected, _ = exact(hidden_BLE.double())
    out, state = mixer(hidden_BLE, return_state=True)
    assert (out.dtype, state.conv.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    scale = expected.detach().abs().max()
    assert float((out.double() - expected).detach().abs().max() / scale) < 0.05
    step, state = mixer(hidden_BLE[:, :1], state=state, return_state=True)
    assert (step.dtype, state.conv.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    out.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in mixer.parameters())


def test_decays_are_computed_in_fp32_in_a_bf16_module() -> None:
    mixer = make_mixer(torch.bfloat16)
    seen: dict[str, torch.dtype] = {}

    def spy(x_BLD: Tensor, dt_BLD: Tensor, A_DN: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        seen.update(A=A_DN.dtype, D=options["D_D"].dtype, bias=options["dt_bias_D"].dtype)
        return x_BLD, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybridize.mixers.mamba1.selective_scan", spy)
        mixer(make_hidden(3).bfloat16())
    assert seen == dict.fromkeys(("A", "D", "bias"), torch.float32)


def test_reset_parameters_is_the_constructor_of_the_paper() -> None:
    spec = Mamba1Spec(state_size=8, d_inner=512, d_xb=128, dt_rank=16, dt_min=1e-5, dt_max=0.2).resolve(GEOMETRY)
    mixer = Mamba1Mixer(spec, 64, initializer_range=0.03)
    torch.testing.assert_close(mixer.A_log, torch.arange(1.0, 9.0).log().expand(512, 8))
    assert torch.equal(mixer.D, torch.ones(512))
    assert float(mixer.dt_proj.weight.detach().abs().max()) <= 0.25
    assert float(mixer.dt_proj.weight.detach().std()) == pytest.approx(0.25 / math.sqrt(3), rel=0.05)
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias.detach().double())
    assert 0.99e-4 < float(steps.min()) < 2e-4  # the floor, above dt_min
    assert 0.1 < float(steps.max()) <= 0.2001
    assert float(steps.log().median()) == pytest.approx(math.log(1e-5 * 0.2) / 2, abs=0.9)
    for projection in (mixer.in_proj, mixer.dt_in_proj, mixer.out_proj):
        assert projection.bias is None
        assert float(projection.weight.detach().std()) == pytest.approx(0.03, rel=0.1)


def test_initialisation_follows_the_generator_or_the_global_seed() -> None:
    mixer = make_mixer(torch.float32)

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
        mixer = make_mixer(torch.float32)
    assert all(parameter.is_meta for parameter in mixer.parameters())
    mixer.to_empty(device="cpu").reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in mixer.parameters())
    assert torch.isfinite(mixer(make_hidden(5).float())[0]).all()


def test_state_size_is_told_without_running() -> None:
    mixer = make_mixer(torch.bfloat16)
    _, state = mixer(make_hidden(3, batch=5).bfloat16(), return_state=True)
    assert mixer.state_shapes(5) == {name: tuple(getattr(state, name).shape) for name in MixerState._fields}
    assert mixer.state_bytes(torch.bfloat16, 5) == sum(t.numel() * t.itemsize for t in state)
    paper_sized = Mamba1Spec().resolve(AttentionGeometry(hidden_size=5120, num_heads=32, num_kv_heads=8, head_dim=128))
    with torch.device("meta"):
        mixer = Mamba1Mixer(paper_sized, 5120)
    assert mixer.state_bytes(torch.bfloat16) == 4096 * 16 * 4 + 4096 * 4 * 2


def test_a_spec_stored_before_there_were_biases_and_norms_builds_a_mixer_without() -> None:
    stored = Mamba1Spec.model_validate({"type": "mamba1", "state_size": 4, "d_inner": 24, "d_xb": 8, "dt_rank": 3})
    assert Mamba1Mixer(stored, HIDDEN).state_dict().keys() == make_mixer().state_dict().keys()


def test_wrong_arguments_are_named_with_their_remedy() -> None:
    mixer = make_mixer()
    hidden_BLE = make_hidden(4)
    with pytest.raises(ValueError, match=r"hidden_BLE: shape \(2, 4, 3\); pass \[batch, length, 20\]"):
        mixer(hidden_BLE[..., :3])
    with pytest.raises(ValueError, match=r"valid_BL: torch.int64 .* pass a bool tensor of shape \[2, 4\]"):
        mixer(hidden_BLE, valid_BL=torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"starts_BL: .* \(2, 3\); pass a bool tensor of shape \[2, 4\]"):
        mixer(hidden_BLE, starts_BL=torch.ones(2, 3, dtype=torch.bool))
    _, state = mixer(hidden_BLE[:1], return_state=True)
    with pytest.raises(ValueError, match=r"state.conv: shape \(1, 24, 4\); pass \[2, 24, 4\]"):
        mixer(hidden_BLE, state=state)
    with pytest.raises(ValueError, match=r"open sizes; call spec.resolve"):
        build_mixer(Mamba1Spec(), HIDDEN)
    with pytest.raises(ValueError, match=r"no mixer is built from a AttentionSpec; use one of .*Mamba1Spec"):
        build_mixer(AttentionSpec(), HIDDEN)

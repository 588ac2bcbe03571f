"""The mixers with a delta rule: the papers' formulas, packing, padding, state, initialisation."""

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.mixers import GatedDeltaNetMixer, KimiDeltaAttentionMixer, MixerState, build_mixer
from hybridize.mixers.delta_rule import DeltaRuleMixer
from hybridize.spec.mixers import AttentionGeometry, DeltaRuleSpec, GatedDeltaNetSpec, KimiDeltaAttentionSpec

HIDDEN = 20
GEOMETRY = AttentionGeometry(hidden_size=HIDDEN, num_heads=4, num_kv_heads=2, head_dim=6)
EVERYTHING = AttentionGeometry(
    **GEOMETRY.model_dump(exclude={"qkv_bias", "output_bias", "qk_norm", "norm_eps"}),
    qkv_bias=True,
    output_bias=True,
    qk_norm="head",
    norm_eps=1e-3,
)
EXACT = {"rtol": 1e-10, "atol": 1e-11}
SPECS: dict[str, type[DeltaRuleSpec]] = {"gated": GatedDeltaNetSpec, "kimi": KimiDeltaAttentionSpec}

both_kinds = pytest.mark.parametrize("kind", list(SPECS))


@pytest.fixture(autouse=True)
def _fresh_but_reported_seed() -> None:
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    print(f"seed {seed}")  # pytest shows it when the test fails


def make_mixer(
    kind: str, dtype: torch.dtype = torch.float64, geometry: AttentionGeometry = GEOMETRY, **changes: Any
) -> DeltaRuleMixer:
    if kind == "kimi":
        changes = {"gate_rank": 3} | changes
    mixer = build_mixer(SPECS[kind](**changes).resolve(geometry), HIDDEN, initializer_range=0.5)
    assert isinstance(mixer, DeltaRuleMixer)
    with torch.no_grad():  # away from the special values of the constructor
        for parameter in mixer.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return mixer.to(dtype)


def make_full_mixer(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> DeltaRuleMixer:
    """With every bias and norm there is."""
    return make_mixer(kind, dtype, EVERYTHING, gate_bias=True, **changes)


def make_hidden(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64)


def rms(tensor: Tensor, weight: Tensor, eps: float) -> Tensor:
    return tensor / (tensor.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def paper(mixer: DeltaRuleMixer, hidden_LE: Tensor) -> Tensor:
    """One document, token by token and head by head, from the papers' formulas alone."""
    spec, weights = mixer.spec, dict(mixer.named_parameters())
    width, heads, groups = mixer.head_dim, mixer.num_heads, mixer.num_groups

    def project(name: str, inputs: Tensor = hidden_LE) -> Tensor:
        out = inputs @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
    if spec.qk_norm == "width":
        q, k = rms(q, weights["q_norm.weight"], spec.norm_eps), rms(k, weights["k_norm.weight"], spec.norm_eps)
    if spec.qk_norm == "head":
        q = rms(q.view(-1, heads, width), weights["q_norm.weight"], spec.norm_eps).flatten(1)
        k = rms(k.view(-1, groups, width), weights["k_norm.weight"], spec.norm_eps).flatten(1)
    qkv, taps = torch.cat([q, k, v], dim=-1), weights["conv1d.weight"].shape[-1]
    padded = torch.cat([qkv.new_zeros(taps - 1, qkv.shape[1]), qkv]).T.unsqueeze(0)
    qkv = torch.nn.functional.conv1d(padded, weights["conv1d.weight"], groups=qkv.shape[1])[0].T
    if spec.conv_activation == "silu":
        qkv = torch.nn.functional.silu(qkv)
    q, k, v = qkv.split([heads * width, groups * width, groups * width], dim=-1)
    beta = torch.sigmoid(project("b_proj"))
    if isinstance(mixer, GatedDeltaNetMixer):
        steps = torch.log1p(torch.exp(project("a_proj") + weights["dt_bias"])).repeat_interleave(width, dim=-1)
    else:
        steps = torch.log1p(torch.exp(project("f_b_proj", project("f_a_proj")) + weights["dt_bias"]))
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        own = slice(head * width, (head + 1) * width)
        shared = slice(group * width, (group + 1) * width)
        q_LK, k_LK, v_LV = q[:, own], k[:, shared], v[:, shared]
        if spec.l2_norm:
            q_LK = q_LK / (q_LK.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()
            k_LK = k_LK / (k_LK.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()
        alpha_LK = torch.exp(-torch.exp(weights["A_log"][head]) * steps[:, own])
        state_KV, rows = q.new_zeros(width, width), []
        for t in range(len(q)):
            erase = torch.eye(width) - beta[t, head] * torch.outer(k_LK[t], k_LK[t])
            state_KV = erase @ (alpha_LK[t, :, None] * state_KV) + beta[t, head] * torch.outer(k_LK[t], v_LV[t])
            rows.append(state_KV.T @ q_LK[t] / math.sqrt(width))
        out = torch.stack(rows)
        outputs.append(rms(out, weights["o_norm.weight"], spec.norm_eps) if spec.output_norm else out)
    out = torch.cat(outputs, dim=-1)
    if spec.gate != "none":
        kimi = isinstance(mixer, KimiDeltaAttentionMixer)
        gate = project("g_b_proj", project("g_a_proj")) if kimi else project("g_proj")
        gate = gate + weights.get("gate_bias", torch.zeros(()))
        out = out * (torch.sigmoid(gate) if spec.gate == "sigmoid" else torch.nn.functional.silu(gate))
    return project("o_proj", out)


@both_kinds
@pytest.mark.parametrize("length", [1, 3, 70])
def test_forward_equals_the_paper(kind: str, length: int) -> None:
    mixer = make_mixer(kind)
    hidden_BLE = make_hidden(length)
    out_BLE, state = mixer(hidden_BLE)
    assert state is None
    with torch.no_grad():
        expected = torch.stack([paper(mixer, row) for row in hidden_BLE])
    torch.testing.assert_close(out_BLE, expected, **EXACT)


@both_kinds
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"gate_bias": True}, id="biases and norms of heads"),
        pytest.param({"qk_norm": "width", "norm_eps": 0.1, "qkv_bias": False}, id="norms over the width"),
        pytest.param({"conv_activation": "none", "l2_norm": False, "conv_kernel": 2}, id="plain keys"),
        pytest.param({"gate": "none", "output_norm": False, "output_bias": False}, id="no gate, no norm"),
        pytest.param({"gate": "silu"}, id="silu"),
        pytest.param({"gate": "sigmoid", "qk_norm": "none"}, id="sigmoid"),
        pytest.param({"head_dim": 3}, id="half heads"),
        pytest.param({"num_heads": 6, "num_groups": 3}, id="other numbers of heads"),
    ],
)
def test_every_option_equals_the_paper(kind: str, changes: dict[str, Any]) -> None:
    mixer = make_mixer(kind, geometry=EVERYTHING, **changes)
    with torch.no_grad():  # short keys, so that all is stable without the norm of their length
        for projection in (mixer.k_proj, mixer.q_proj):
            projection.weight.mul_(0.2)
    hidden_BLE = make_hidden(11)
    with torch.no_grad():
        expected = torch.stack([paper(mixer, row) for row in hidden_BLE])
    torch.testing.assert_close(mixer(hidden_BLE)[0], expected, **EXACT)


def test_parameters_have_the_agreed_names_and_shapes() -> None:
    shared = {
        "A_log": (4,),
        "gate_bias": (24,),
        "q_proj.weight": (24, HIDDEN),
        "q_proj.bias": (24,),
        "k_proj.weight": (12, HIDDEN),
        "k_proj.bias": (12,),
        "v_proj.weight": (12, HIDDEN),
        "v_proj.bias": (12,),
        "q_norm.weight": (6,),
        "k_norm.weight": (6,),
        "conv1d.weight": (48, 1, 4),
        "b_proj.weight": (4, HIDDEN),
        "o_norm.weight": (6,),
        "o_proj.weight": (HIDDEN, 24),
        "o_proj.bias": (HIDDEN,),
    }
    own = {
        "gated": {"dt_bias": (4,), "a_proj.weight": (4, HIDDEN), "g_proj.weight": (24, HIDDEN)},
        "kimi": {
            "dt_bias": (24,),
            "f_a_proj.weight": (3, HIDDEN),
            "f_b_proj.weight": (24, 3),
            "g_a_proj.weight": (3, HIDDEN),
            "g_b_proj.weight": (24, 3),
        },
    }
    for kind, extra in own.items():
        mixer = make_full_mixer(kind)
        assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == shared | extra
        plain = make_mixer(kind, gate="none", output_norm=False).state_dict()
        gates = {"g_proj.weight", "g_a_proj.weight", "g_b_proj.weight"}
        own_names = {name for name in extra if name not in gates}
        assert set(plain) == own_names | {f"{name}_proj.weight" for name in "qkvob"} | {"A_log", "conv1d.weight"}
    widths = make_mixer("gated", geometry=EVERYTHING, qk_norm="width").state_dict()
    assert (widths["q_norm.weight"].shape, widths["k_norm.weight"].shape) == ((24,), (12,))


@both_kinds
@pytest.mark.parametrize("first", [1, 2, 30])
def test_decode_steps_equal_the_whole_sequence(kind: str, first: int) -> None:
    mixer = make_full_mixer(kind)
    hidden_BLE = make_hidden(40)
    whole, end = mixer(hidden_BLE, return_state=True)
    out, state = mixer(hidden_BLE[:, :first], return_state=True)
    pieces = [out]
    for t in range(first, 40):
        out, state = mixer(hidden_BLE[:, t : t + 1], state=state, return_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)
    torch.testing.assert_close(state, end, **EXACT)
    shapes = {name: tuple(getattr(state, name).shape) for name in ("conv", "ssm")}
    assert shapes == mixer.state_shapes(2)


@both_kinds
@pytest.mark.parametrize("cuts", [(1,), (2, 3, 5), (33,), (10, 20, 21)])
def test_chunked_prefill_equals_the_whole_sequence(kind: str, cuts: tuple[int, ...]) -> None:
    mixer = make_full_mixer(kind)
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


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_tracks_fp64_with_an_fp32_state(kind: str, dtype: torch.dtype) -> None:
    mixer = make_full_mixer(kind, dtype)
    exact = type(mixer)(mixer.spec, HIDDEN).double()
    exact.load_state_dict(mixer.state_dict())
    hidden_BLE = make_hidden(200).to(dtype)
    expected, _ = exact(hidden_BLE.double())
    out, state = mixer(hidden_BLE, return_state=True)
    assert (out.dtype, state.conv.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    error = (out.double() - expected).detach().norm() / expected.detach().norm()
    assert float(error) < 0.05
    step, state = mixer(hidden_BLE[:, :1], state=state, return_state=True)
    assert (step.dtype, state.conv.dtype, state.ssm.dtype) == (dtype, dtype, torch.float32)
    out.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in mixer.parameters())


@both_kinds
def test_autocast_computes_decays_and_states_in_fp32(kind: str) -> None:
    mixer = make_full_mixer(kind, torch.float32)
    seen: dict[str, torch.dtype] = {}

    def spy(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, None]:
        seen.update(q=q.dtype, k=k.dtype, v=v.dtype, g=g.dtype, beta=beta.dtype)
        return q, None

    hidden_BLE = make_hidden(70).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = mixer(hidden_BLE, return_state=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(mixer), "recurrence", staticmethod(spy))
            mixer(hidden_BLE)
    half, full = torch.bfloat16, torch.float32
    assert seen == {"q": half, "k": half, "v": half, "g": full, "beta": full}
    assert (out.dtype, state.ssm.dtype) == (half, full)
    expected, _ = mixer(hidden_BLE)
    assert float(((out - expected).norm() / expected.norm()).detach()) < 0.05


@both_kinds
def test_decays_keep_the_digits_of_their_fp32_parameters_in_a_bf16_module(kind: str) -> None:
    mixer = make_mixer(kind, torch.bfloat16)
    mixer.A_log.data, mixer.dt_bias.data = mixer.A_log.data.float(), torch.randn(mixer.dt_bias.shape) - 4
    mixer.A_log.data += 1e-3
    with torch.no_grad():
        (mixer.a_proj if kind == "gated" else mixer.f_b_proj).weight.zero_()
    seen: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, None]:
        seen.append(g.detach())
        return q, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(mixer), "recurrence", staticmethod(spy))
        mixer(make_hidden(3).bfloat16())
    steps = torch.nn.functional.softplus(mixer.dt_bias.detach().double()).view(4, -1)
    expected = (-mixer.A_log.detach().double().exp()[:, None] * steps).squeeze(-1).expand(seen[0].shape)
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-6, atol=0)


@both_kinds
def test_reset_parameters_is_the_constructor_of_the_papers(kind: str) -> None:
    geometry = AttentionGeometry(hidden_size=64, num_heads=256, num_kv_heads=128, head_dim=4)
    spec = SPECS[kind](dt_min=1e-5, dt_max=0.2, decay_min=2, decay_max=5, gate_bias=True)
    resolved = spec.resolve(geometry.model_copy(update={"qkv_bias": True, "qk_norm": "head", "output_bias": True}))
    mixer = build_mixer(resolved, 64, initializer_range=0.03)
    tensors = {name: tensor.detach() for name, tensor in mixer.named_parameters()}
    rates = tensors["A_log"].exp()
    assert 2 <= float(rates.min()) < 2.2
    assert 4.8 < float(rates.max()) <= 5.0001
    assert float(rates.mean()) == pytest.approx(3.5, abs=0.3)
    steps = torch.nn.functional.softplus(tensors["dt_bias"].double())
    assert 0.99e-4 < float(steps.min()) < 2e-4  # the floor, above dt_min
    assert 0.1 < float(steps.max()) <= 0.2001
    assert float(tensors["conv1d.weight"].abs().max()) <= 0.5
    assert float(tensors["conv1d.weight"].std()) == pytest.approx(0.5 / math.sqrt(3), rel=0.05)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            assert float(tensor.std()) == pytest.approx(0.03, rel=0.2), name
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        if name.endswith(("proj.bias", "gate_bias")):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name


@both_kinds
def test_initialisation_follows_the_generator_or_the_global_seed(kind: str) -> None:
    mixer = make_full_mixer(kind, torch.float32)

    def reset(seed: int, globally: bool) -> dict[str, Tensor]:
        if globally:
            torch.manual_seed(seed)
            mixer.reset_parameters()
        else:
            before = torch.get_rng_state()
            mixer.reset_parameters(torch.Generator().manual_seed(seed))
            assert torch.equal(torch.get_rng_state(), before)
        return {name: tensor.detach().clone() for name, tensor in mixer.named_parameters()}

    for globally in (True, False):
        first, again, other = reset(1, globally), reset(1, globally), reset(2, globally)
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), name
        changed = {name for name, tensor in first.items() if not torch.equal(tensor, other[name])}
        constant = {name for name in first if name.endswith((".bias", "norm.weight", "gate_bias"))}
        assert changed == set(first) - constant


@both_kinds
def test_an_open_spec_or_a_wrong_argument_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match=r"has open sizes; call spec.resolve"):
        build_mixer(SPECS[kind](), HIDDEN)
    with pytest.raises(ValueError, match=r"gate_bias is set, but gate is none"):
        build_mixer(SPECS[kind](gate="none", gate_bias=True).resolve(GEOMETRY), HIDDEN)
    mixer = make_mixer(kind)
    hidden_BLE = make_hidden(3)
    with pytest.raises(ValueError, match=r"hidden_BLE: shape \(2, 3, 19\); pass \[batch, length, 20\]"):
        mixer(hidden_BLE[..., :19])
    with pytest.raises(ValueError, match=r"starts_BL: torch.bool of shape \(2, 4\); pass a bool tensor of"):
        mixer(hidden_BLE, starts_BL=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"valid_BL: torch.int64 of shape"):
        mixer(hidden_BLE, valid_BL=torch.ones(2, 3, dtype=torch.int64))
    _, state = mixer(hidden_BLE, return_state=True)
    with pytest.raises(ValueError, match=r"state.ssm: shape \(2, 4, 6, 5\); pass \[2, 4, 6, 6\]"):
        mixer(hidden_BLE, state=MixerState(state.conv, state.ssm[..., :5]))

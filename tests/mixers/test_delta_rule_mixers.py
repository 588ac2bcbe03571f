"""The mixers with a delta rule: the papers' formulas, parameters, precision, initialisation, wrong arguments."""

import math
from typing import Any

import pytest
import torch
from delta_rule_mixer_inputs import (
    EVERYTHING,
    EXACT,
    GEOMETRY,
    HIDDEN,
    SPECS,
    both_kinds,
    make_full_mixer,
    make_hidden,
    make_mixer,
)
from torch import Tensor

from hybridize.mixers import GatedDeltaNetMixer, KimiDeltaAttentionMixer, MixerState, build_mixer
from hybridize.mixers.delta_rule import DeltaRuleMixer
from hybridize.spec.mixers import AttentionGeometry


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


def given_to_the_recurrence(mixer: DeltaRuleMixer, hidden_BLE: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def spy(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, None]:
        seen.update(q=q, k=k, v=v, g=g, beta=beta)
        return q, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(mixer), "recurrence", staticmethod(spy))
        mixer(hidden_BLE)
    return {name: tensor.detach() for name, tensor in seen.items()}


@both_kinds
def test_autocast_computes_decays_and_states_in_fp32(kind: str) -> None:
    mixer = make_full_mixer(kind, torch.float32)
    hidden_BLE = make_hidden(70).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = mixer(hidden_BLE, return_state=True)
        seen = {name: tensor.dtype for name, tensor in given_to_the_recurrence(mixer, hidden_BLE).items()}
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
    g = given_to_the_recurrence(mixer, make_hidden(3).bfloat16())["g"]
    steps = torch.nn.functional.softplus(mixer.dt_bias.detach().double()).view(4, -1)
    expected = (-mixer.A_log.detach().double().exp()[:, None] * steps).squeeze(-1).expand(g.shape)
    torch.testing.assert_close(g.double(), expected, rtol=1e-6, atol=0)


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

"""Attention to Mamba-1 beyond the paper's: neutral is linear attention, biases and norms are carried."""

import time
from typing import Any

import pytest
import torch
from state_space_example import HEAD, PLAIN, WIDTH, build_mixer_from, draw_attention, linear_attention, plan_from
from torch.nn.functional import silu, softplus

from hybridize.spec import AttentionGeometry, Mamba1Spec
from hybridize.transfer import aligned_order

MEMORIES = [16 * 256 ** (rank / 5) for rank in (0, 2, 4, 1, 3, 5)]  # heads of both key/value heads spread
PREFIX = "self_attn.mixer."


@pytest.fixture(autouse=True)
def _fresh_but_reported_seed() -> None:
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    print(f"seed {seed}")  # pytest shows it when the test fails


@pytest.mark.parametrize("dt_bias_mode", ["single", "double"])
@pytest.mark.parametrize(
    ("geometry", "state_size"),
    [(PLAIN, 8), (HEAD, 8), (WIDTH, 8), (PLAIN, 4), (WIDTH, 2)],
    ids=["heads", "heads normalised", "normalised together", "slices", "slices normalised together"],
)
@torch.no_grad()
def test_neutral_without_decay_is_linear_attention_to_silu_of_the_values(
    geometry: AttentionGeometry, state_size: int, dt_bias_mode: str
) -> None:
    # This mixer's convolution is always followed by SiLU.
    sources = draw_attention(geometry)
    plan = plan_from(geometry, Mamba1Spec(state_size=state_size, gate_bias=True, dt_bias_mode=dt_bias_mode), "neutral")
    assert not plan.dropped
    mixer = build_mixer_from(plan, sources)
    mixer.A_log.fill_(-100.0)
    hidden_BLE = torch.randn(2, 70, 24, dtype=torch.float64)
    out_BLE, _ = mixer(hidden_BLE)
    weights = [1 / memory for memory in MEMORIES]  # the step sizes
    expected = linear_attention(
        hidden_BLE, sources, geometry, weight_of_head=weights, slice_width=state_size, activation=silu
    )
    scale = float(expected.abs().max())
    torch.testing.assert_close(out_BLE, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("init", ["neutral", "attention_gate"])
def test_neutral_sets_what_attention_lacks(init: str) -> None:
    plan = plan_from(PLAIN, Mamba1Spec(state_size=4, gate_bias=True), init)
    made = {name.removeprefix(PREFIX): tensor for name, tensor in plan.apply(draw_attention(PLAIN)).items()}
    taps = made["conv1d.weight"]
    assert torch.equal(taps[..., -1], torch.ones(48, 1))
    assert not taps[..., :-1].any()
    for name in ("conv1d.bias", "D", "A_log", "dt_proj.weight"):
        assert not made[name].any(), name
    torch.testing.assert_close(silu(made["gate_bias"]), torch.ones(48))
    heads = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]  # by key/value head, slice and query head
    lengths = torch.tensor([MEMORIES[head] for head in heads for _ in range(4)])
    torch.testing.assert_close(1 / softplus(made["dt_proj.bias"]), lengths, rtol=1e-4, atol=0)
    assert float(made["dt_in_proj.weight"].std()) == pytest.approx(0.02, rel=0.3)  # its gradient needs it


@pytest.mark.parametrize("state_size", [8, 4])
def test_the_gates_rows_are_what_the_init_says(state_size: int) -> None:
    sources = draw_attention(PLAIN)

    def gate(init: str, gate_bias: bool) -> torch.Tensor:
        spec = Mamba1Spec(state_size=state_size, gate_bias=gate_bias)
        return plan_from(PLAIN, spec, init).apply(sources)[f"{PREFIX}in_proj.weight"][:48]

    assert not gate("neutral", True).any()
    for init, gate_bias in (("neutral", False), ("aligned", True), ("published", False)):
        assert float(gate(init, gate_bias).std()) == pytest.approx(0.02, rel=0.15)
    values = sources["self_attn.v_proj.weight"].view(2, 1, 8, 24).expand(2, 3, 8, 24).reshape(48, 24)
    expected = 0.5 * (sources["self_attn.o_proj.weight"].T + values)[list(aligned_order(PLAIN, state_size))]
    torch.testing.assert_close(gate("attention_gate", False), expected)


@pytest.mark.parametrize("init", ["aligned", "neutral", "attention_gate", "published"])
def test_biases_and_norms_are_carried(init: str) -> None:
    sources = draw_attention(WIDTH)
    plan = plan_from(WIDTH, Mamba1Spec(state_size=4), init)
    assert not plan.dropped
    made = {name.removeprefix(PREFIX): tensor for name, tensor in plan.apply(sources).items()}
    order = list(range(48)) if init == "published" else list(aligned_order(WIDTH, 4))
    source = {name.removeprefix("self_attn."): tensor for name, tensor in sources.items()}
    biases = [source["v_proj.bias"], source["k_proj.bias"], source["q_proj.bias"][order]]
    assert torch.equal(made["qkv_bias"], torch.cat(biases))
    assert torch.equal(made["out_proj.bias"], source["o_proj.bias"])
    assert torch.equal(made["q_norm.weight"], source["q_norm.weight"][order])
    assert torch.equal(made["k_norm.weight"], source["k_norm.weight"])


@pytest.mark.parametrize("init", ["aligned", "neutral", "attention_gate", "published", "random"])
@pytest.mark.parametrize("geometry", [PLAIN, HEAD, WIDTH], ids=["plain", "head norm", "width norm"])
def test_every_tensor_of_both_sides_is_accounted_for(geometry: AttentionGeometry, init: str) -> None:
    sources = draw_attention(geometry)
    plan = plan_from(geometry, Mamba1Spec(state_size=8, gate_bias=True), init)
    mixer = build_mixer_from(plan, sources)
    assert [entry.target for entry in plan.entries] == [f"{PREFIX}{name}" for name in mixer.state_dict()]
    assert set(plan.used) | set(plan.dropped) == set(sources)
    assert bool(plan.dropped) == (init == "random")
    assert torch.isfinite(mixer(torch.randn(1, 5, 24, dtype=torch.float64))[0]).all()


@pytest.mark.parametrize("init", ["aligned", "published"])
def test_a_mixer_without_biases_and_norms_is_the_one_of_a_plain_teacher(init: str) -> None:
    bare: dict[str, Any] = {"qkv_bias": False, "output_bias": False, "qk_norm": "none"}
    sources = draw_attention(HEAD)
    plan = plan_from(HEAD, Mamba1Spec(state_size=4, **bare), init)
    plain = plan_from(PLAIN, Mamba1Spec(state_size=4), init)
    assert set(plan.dropped) == {name for name in sources if not name.endswith("proj.weight")}
    got, expected = plan.apply(sources), plain.apply(sources)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"state_size": 4, "qk_norm": "head"},
            r"mixer.qk_norm: .* heads of width 8, .* state_size 4; .* or qk_norm to 'none'",
        ),
        ({"state_size": 8, "qk_norm": "width"}, r"mixer.qk_norm: 'width' differs from the teacher's 'head'"),
        ({"state_size": 16, "qk_norm": "none"}, r"mixer.state_size: 16 does not divide the teacher's head width 8"),
    ],
)
def test_misfits_are_named_with_a_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_from(HEAD, Mamba1Spec(**changes), "aligned")

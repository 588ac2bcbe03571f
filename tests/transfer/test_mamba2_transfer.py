"""Attention to Mamba-2: neutral is linear attention, every init is what it says."""

import math
import time
from typing import Any

import pytest
import torch
from state_space_example import (
    HEAD,
    PLAIN,
    WIDTH,
    build_mixer_from,
    draw_attention,
    linear_attention,
    plan_from,
)
from torch.nn.functional import silu, softplus

from hybridize.spec import AttentionGeometry, Mamba2Spec
from hybridize.transfer import aligned_order

BARE: dict[str, Any] = {"conv_activation": "none", "gate_norm": False, "gate_bias": True}
MEMORIES = [16 * 256 ** (rank / 5) for rank in (0, 2, 4, 1, 3, 5)]  # heads of both key/value heads spread
PREFIX = "self_attn.mixer."


@pytest.fixture(autouse=True)
def _fresh_but_reported_seed() -> None:
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    print(f"seed {seed}")  # pytest shows it when the test fails


@pytest.mark.parametrize(
    ("geometry", "sizes", "slice_width"),
    [
        pytest.param(PLAIN, {}, None, id="plain heads"),
        pytest.param(HEAD, {}, None, id="heads, each normalised"),
        pytest.param(WIDTH, {}, None, id="heads, normalised together"),
        pytest.param(PLAIN, {"head_dim": 4}, None, id="slices of values"),
        pytest.param(HEAD, {"head_dim": 2}, None, id="slices of values, heads normalised"),
        pytest.param(WIDTH, {"head_dim": 4}, None, id="slices of values, normalised together"),
        pytest.param(PLAIN, {"state_size": 4}, 4, id="slices"),
        pytest.param(WIDTH, {"state_size": 2}, 2, id="slices, normalised together"),
    ],
)
@torch.no_grad()
def test_neutral_without_decay_is_linear_attention(
    geometry: AttentionGeometry, sizes: dict[str, int], slice_width: int | None
) -> None:
    sources = draw_attention(geometry)
    plan = plan_from(geometry, Mamba2Spec(**BARE, **sizes), "neutral")
    assert not plan.dropped
    mixer = build_mixer_from(plan, sources)
    mixer.A_log.fill_(-100.0)
    hidden_BLE = torch.randn(2, 150, 24, dtype=torch.float64)
    out_BLE, _ = mixer(hidden_BLE)
    weights = [1 / memory for memory in MEMORIES]  # the step sizes
    expected = linear_attention(hidden_BLE, sources, geometry, weight_of_head=weights, slice_width=slice_width)
    scale = float(expected.abs().max())
    torch.testing.assert_close(out_BLE, expected, rtol=1e-5, atol=1e-5 * scale)


def test_neutral_heads_forget_at_their_own_pace() -> None:
    plan = plan_from(PLAIN, Mamba2Spec(head_dim=4), "neutral")
    made = plan.apply(draw_attention(PLAIN))
    rates = softplus(made[f"{PREFIX}dt_bias"].double()) * made[f"{PREFIX}A_log"].double().exp()
    heads = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]  # by key/value head, slice and query head
    torch.testing.assert_close(1 / rates, torch.tensor([MEMORIES[h] for h in heads]).double(), rtol=1e-5, atol=0)
    alone = AttentionGeometry(hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8)
    only = plan_from(alone, Mamba2Spec(), "neutral").apply(draw_attention(alone))
    assert float(1 / softplus(only[f"{PREFIX}dt_bias"])) == pytest.approx(256, rel=1e-4)


@pytest.mark.parametrize("init", ["neutral", "attention_gate"])
def test_neutral_sets_what_attention_lacks(init: str) -> None:
    made = plan_from(PLAIN, Mamba2Spec(gate_bias=True), init).apply(draw_attention(PLAIN))
    made = {name.removeprefix(PREFIX): tensor for name, tensor in made.items()}
    taps = made["conv1d.weight"]
    assert torch.equal(taps[..., -1], torch.ones(80, 1))
    assert not taps[..., :-1].any()
    for name in ("conv1d.bias", "D", "A_log"):
        assert not made[name].any(), name
    assert not made["in_proj.weight"][-6:].any()
    torch.testing.assert_close(silu(made["gate_bias"]), torch.ones(48))
    assert torch.equal(made["norm.weight"], torch.ones(48))


@pytest.mark.parametrize("width", [8, 4])
def test_the_gates_rows_are_what_the_init_says(width: int) -> None:
    sources = draw_attention(PLAIN)
    order = list(aligned_order(PLAIN, width))

    def gate(init: str, gate_bias: bool) -> torch.Tensor:
        spec = Mamba2Spec(head_dim=width, state_size=width, gate_bias=gate_bias)
        return plan_from(PLAIN, spec, init).apply(sources)[f"{PREFIX}in_proj.weight"][:48]

    assert not gate("neutral", True).any()
    for init, gate_bias in (("neutral", False), ("aligned", True), ("published", False)):
        assert float(gate(init, gate_bias).std()) == pytest.approx(0.02, rel=0.15)
    values = sources["self_attn.v_proj.weight"].view(2, 1, 8, 24).expand(2, 3, 8, 24).reshape(48, 24)
    expected = 0.5 * (sources["self_attn.o_proj.weight"].T + values)[order]
    torch.testing.assert_close(gate("attention_gate", False), expected)
    torch.testing.assert_close(gate("attention_gate", True), expected)


@pytest.mark.parametrize("init", ["aligned", "published"])
def test_attention_is_carried_and_the_rest_as_the_constructor_makes_it(init: str) -> None:
    sources = draw_attention(WIDTH)
    spec = Mamba2Spec(state_size=4, dt_min=0.01, dt_max=0.2, decay_min=2, decay_max=3)
    plan = plan_from(WIDTH, spec, init)
    assert not plan.dropped
    made = {name.removeprefix(PREFIX): tensor for name, tensor in plan.apply(sources).items()}
    order = list(range(48)) if init == "published" else list(aligned_order(WIDTH, 4))
    source = {name.removeprefix("self_attn."): tensor for name, tensor in sources.items()}
    _, x, b, c, dt = made["in_proj.weight"].split([48, 16, 16, 48, 12])
    assert torch.equal(x, source["v_proj.weight"])
    assert torch.equal(b, source["k_proj.weight"])
    assert torch.equal(c, source["q_proj.weight"][order])
    biases = [source["v_proj.bias"], source["k_proj.bias"], source["q_proj.bias"][order]]
    assert torch.equal(made["qkv_bias"], torch.cat(biases))
    assert torch.equal(made["out_proj.weight"], source["o_proj.weight"][:, order])
    assert torch.equal(made["out_proj.bias"], source["o_proj.bias"])
    assert torch.equal(made["q_norm.weight"], source["q_norm.weight"][order])
    assert torch.equal(made["k_norm.weight"], source["k_norm.weight"])
    assert float(dt.std()) == pytest.approx(0.02, rel=0.3)
    assert torch.equal(made["D"], torch.ones(12))
    assert 2 <= float(made["A_log"].exp().min()) <= float(made["A_log"].exp().max()) <= 3.001
    assert 0.0099 <= float(softplus(made["dt_bias"]).min()) <= float(softplus(made["dt_bias"]).max()) <= 0.2001
    assert 0.4 < float(made["conv1d.weight"].abs().max()) <= 0.5


@pytest.mark.parametrize("init", ["aligned", "neutral", "attention_gate", "published", "random"])
@pytest.mark.parametrize("geometry", [PLAIN, HEAD, WIDTH], ids=["plain", "head norm", "width norm"])
def test_every_tensor_of_both_sides_is_accounted_for(geometry: AttentionGeometry, init: str) -> None:
    sources = draw_attention(geometry)
    plan = plan_from(geometry, Mamba2Spec(gate_bias=True), init)
    mixer = build_mixer_from(plan, sources)
    assert [entry.target for entry in plan.entries] == [f"{PREFIX}{name}" for name in mixer.state_dict()]
    assert set(plan.used) | set(plan.dropped) == set(sources)
    assert bool(plan.dropped) == (init == "random")
    assert torch.isfinite(mixer(torch.randn(1, 5, 24, dtype=torch.float64))[0]).all()


def test_what_the_mixer_is_not_to_have_is_dropped_and_told() -> None:
    spec = Mamba2Spec(state_size=4, qkv_bias=False, output_bias=False, qk_norm="none")
    plan = plan_from(HEAD, spec, "aligned")
    names = [f"{part}_proj.bias" for part in "qkvo"] + ["q_norm.weight", "k_norm.weight"]
    assert set(plan.dropped) == {f"self_attn.{name}" for name in names}


def test_what_attention_does_not_have_starts_without_effect() -> None:
    spec = Mamba2Spec(qkv_bias=True, output_bias=True, qk_norm="width")
    made = plan_from(PLAIN, spec, "aligned").apply(draw_attention(PLAIN))
    for name in ("qkv_bias", "out_proj.bias"):
        assert not made[PREFIX + name].any()
    assert torch.equal(made[f"{PREFIX}q_norm.weight"], torch.ones(48))


@pytest.mark.parametrize(
    ("sizes", "init", "note"),
    [
        ({}, "aligned", "6 of 6 heads pair the same slice of query, key, value and output"),
        ({}, "published", "6 of 6 heads pair the same slice"),
        ({"state_size": 4}, "neutral", "12 of 12 heads pair the same slice"),
        ({"state_size": 4}, "published", "8 of 12 heads pair the same slice"),
        ({"head_dim": 2}, "aligned", "24 of 24 heads pair a slice of value and output with all of their query"),
        ({"state_size": 16}, "published", "no head is aligned: heads of width 16 cut across heads of width 8"),
    ],
)
def test_the_note_counts_the_heads_that_pair_rightly(sizes: dict[str, int], init: str, note: str) -> None:
    assert plan_from(PLAIN, Mamba2Spec(**sizes), init).note.startswith(note)


@pytest.mark.parametrize(
    ("geometry", "changes", "init", "message"),
    [
        (
            PLAIN,
            {"num_heads": 4},
            "aligned",
            r"mixer.num_heads: 4 differs from the teacher's 6 .*; leave num_heads",
        ),
        (
            PLAIN,
            {"num_groups": 3},
            "neutral",
            r"mixer.num_groups: 3 differs from the teacher's 2 .*; leave",
        ),
        (PLAIN, {"state_size": 16, "head_dim": 8}, "aligned", r"mixer.state_size: 16 is neither head_dim 8 nor"),
        (PLAIN, {"state_size": 16}, "aligned", r"mixer.head_dim: 16 does not divide the teacher's head width 8"),
        (PLAIN, {"head_dim": 4}, "published", r"mixer.num_heads x state_size: 96 differs from the teacher's 48"),
        (
            HEAD,
            {"state_size": 4, "qk_norm": "head"},
            "aligned",
            r"mixer.qk_norm: .* heads of width 8, .* state_size 4; .* or qk_norm to",
        ),
        (HEAD, {"qk_norm": "width"}, "aligned", r"mixer.qk_norm: 'width' differs from the teacher's 'head'"),
    ],
)
def test_misfits_are_named_with_a_remedy(
    geometry: AttentionGeometry, changes: dict[str, Any], init: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_from(geometry, Mamba2Spec(**changes), init)


def test_the_plan_says_what_the_numbers_are() -> None:
    text = str(plan_from(PLAIN, Mamba2Spec(gate_bias=True), "neutral"))
    for words in (
        "(z) set: 0, a gate that its bias alone decides",
        "(dt) set: 0, step sizes the same for every token",
        "conv1d.weight [80 x 1 x 4] = set: 1 at the newest tap, 0 elsewhere",
        "memories log-uniform in [16, 4096] tokens",
    ):
        assert words in text
    assert math.isclose(float(silu(torch.tensor(1.2784645427610738, dtype=torch.float64))), 1, abs_tol=1e-12)

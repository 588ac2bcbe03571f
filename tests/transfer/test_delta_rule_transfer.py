"""Attention to the mixers with a delta rule: linear attention in the teacher's own pairing, and what the inits set."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from hybridize.mixers import build_mixer
from hybridize.models import Projection
from hybridize.spec import AttentionGeometry, GatedDeltaNetSpec, KimiDeltaAttentionSpec
from hybridize.transfer import plan_transfer
from hybridize.transfer.plan import TransferPlan

SIZES = {"hidden_size": 24, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
PLAIN = AttentionGeometry(**SIZES)
SPECS: dict[str, Any] = {"gated": GatedDeltaNetSpec, "kimi": KimiDeltaAttentionSpec}
TINY = 1e-5  # keys so short that the delta rule erases nothing: a plain sum of keys times values is left

both_kinds = pytest.mark.parametrize("kind", list(SPECS))


def draw_attention(geometry: AttentionGeometry, seed: int = 0) -> dict[str, Tensor]:
    """Weights, biases and norms, in fp64, with short keys."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths = {"q_proj": geometry.query_width, "k_proj": geometry.kv_width, "v_proj": geometry.kv_width}
    tensors = {f"self_attn.{name}.weight": draw(width, geometry.hidden_size) / 5 for name, width in widths.items()}
    tensors["self_attn.o_proj.weight"] = draw(geometry.hidden_size, geometry.query_width) / 5
    if geometry.qkv_bias:
        tensors |= {f"self_attn.{name}.bias": draw(width) for name, width in widths.items()}
    if geometry.output_bias:
        tensors["self_attn.o_proj.bias"] = draw(geometry.hidden_size)
    if geometry.qk_norm != "none":
        across = geometry.qk_norm == "width"
        tensors["self_attn.q_norm.weight"] = draw(geometry.query_width if across else geometry.head_dim)
        tensors["self_attn.k_norm.weight"] = draw(geometry.kv_width if across else geometry.head_dim)
    for name in ("k_proj.weight", "k_proj.bias", "k_norm.weight"):
        if (name == "k_norm.weight") == (geometry.qk_norm != "none") and f"self_attn.{name}" in tensors:
            tensors[f"self_attn.{name}"] *= TINY
    return tensors


def plan_for(geometry: AttentionGeometry, spec: Any, init: str, **options: Any) -> TransferPlan:
    norms = () if geometry.qk_norm == "none" else ("q_norm", "k_norm")
    return plan_transfer(geometry, spec, init, norms=norms, **options)


def build(plan: TransferPlan, sources: dict[str, Tensor]) -> Any:
    mixer = build_mixer(plan.spec, plan.hidden_size).double()
    made = plan.apply(sources)
    mixer.load_state_dict({name.removeprefix(f"{plan.prefix}."): tensor for name, tensor in made.items()})
    return mixer


def linear_attention(
    hidden_BLE: Tensor,
    sources: dict[str, Tensor],
    geometry: AttentionGeometry,
    slice_width: int,
    memories: list[float],
    kv_head_of: list[int],
) -> Tensor:
    """The teacher's attention without softmax, RoPE and scale, its scores taken slice by slice and fading with time."""

    def project(name: str, inputs: Tensor) -> Tensor:
        out = inputs @ sources[f"self_attn.{name}.weight"].T
        return out + sources.get(f"self_attn.{name}.bias", torch.zeros(()))

    def normalised(tensor: Tensor, name: str) -> Tensor:
        scale = (tensor.square().mean(dim=-1, keepdim=True) + geometry.norm_eps).rsqrt()
        return tensor * scale * sources[f"self_attn.{name}.weight"]

    query, key, value = (project(name, hidden_BLE) for name in ("q_proj", "k_proj", "v_proj"))
    if geometry.qk_norm == "width":
        query, key = normalised(query, "q_norm"), normalised(key, "k_norm")
    query, key, value = (tensor.unflatten(-1, (-1, geometry.head_dim)) for tensor in (query, key, value))
    if geometry.qk_norm == "head":
        query, key = normalised(query, "q_norm"), normalised(key, "k_norm")
    times = torch.arange(hidden_BLE.shape[1], dtype=torch.float64)
    outputs = []
    for head in range(geometry.num_heads):
        fading = torch.exp((times - times[:, None]) / memories[head]).tril()
        for first in range(0, geometry.head_dim, slice_width):
            part = slice(first, first + slice_width)
            scores_BTS = query[:, :, head, part] @ key[:, :, kv_head_of[head], part].transpose(1, 2)
            outputs.append((scores_BTS * fading) @ value[:, :, kv_head_of[head], part])
    return project("o_proj", torch.cat(outputs, dim=-1))


def assert_is_linear_attention(geometry: AttentionGeometry, spec: Any) -> None:
    """The mixer of a neutral transfer is linear attention, with fading and without, times β = 1/2 and width^-1/2.

    A gate that is a sigmoid is another factor of 1/2.
    """
    sources = draw_attention(geometry)
    plan = plan_for(geometry, spec, "neutral")
    mixer = build(plan, sources)
    width = plan.spec.head_dim
    hidden_BLE = torch.randn(2, 70, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    teacher = [head // geometry.group_size for head in range(geometry.num_heads)]
    expected_memories = [16 * 256 ** ((head % 3 * 2 + head // 3) / 5) for head in range(6)]
    bias = sources.get("self_attn.o_proj.bias", torch.zeros(24, dtype=torch.float64))
    for memories in (expected_memories, [math.inf] * 6):
        if math.inf in memories:
            with torch.no_grad():
                mixer.A_log.fill_(-math.inf)
        expected = linear_attention(hidden_BLE, sources, geometry, width, memories, teacher) - bias
        expected *= (0.25 if plan.spec.gate == "sigmoid" else 0.5) / math.sqrt(width)
        with torch.no_grad():
            got = mixer(hidden_BLE)[0] - bias
        assert float((got - expected).norm() / expected.norm()) < 1e-6


PLAIN_READING = {"conv_activation": "none", "l2_norm": False, "output_norm": False}


@both_kinds
@pytest.mark.parametrize("head_dim", [8, 4, 2])
@pytest.mark.parametrize(
    ("gate", "gate_bias"), [("silu", True), ("sigmoid", True), ("sigmoid", False), ("none", False)]
)
def test_neutral_transfer_is_fading_linear_attention(kind: str, head_dim: int, gate: str, gate_bias: bool) -> None:
    spec = SPECS[kind](head_dim=head_dim, gate=gate, gate_bias=gate_bias, **PLAIN_READING)
    assert_is_linear_attention(PLAIN, spec)


@both_kinds
@pytest.mark.parametrize(("qk_norm", "head_dim"), [("none", 8), ("head", 8), ("width", 8), ("width", 4)])
def test_neutral_transfer_carries_biases_and_norms(kind: str, qk_norm: str, head_dim: int) -> None:
    geometry = AttentionGeometry(**SIZES, qkv_bias=True, output_bias=True, qk_norm=qk_norm, norm_eps=1e-3)
    assert_is_linear_attention(geometry, SPECS[kind](head_dim=head_dim, gate="sigmoid", **PLAIN_READING))


@both_kinds
@pytest.mark.parametrize(("qk_norm", "head_dim"), [("head", 8), ("width", 4)])
def test_what_the_teachers_norms_add_to_their_weight_is_carried_too(kind: str, qk_norm: str, head_dim: int) -> None:
    geometry = AttentionGeometry(**SIZES, qk_norm=qk_norm)
    sources = draw_attention(geometry)
    spec = SPECS[kind](head_dim=head_dim)
    made = plan_for(geometry, spec, "aligned", target="m", norm_offset=1.0).apply(sources)
    plain = plan_for(geometry, spec, "aligned", target="m").apply(sources)
    for name in ("q_norm.weight", "k_norm.weight"):
        torch.testing.assert_close(made[f"m.{name}"], 1 + plain[f"m.{name}"])
    if qk_norm == "width":
        # Row by row, a query's weight and its norm's are those of one channel of the teacher.
        factors = dict(zip(map(tuple, sources["self_attn.q_proj.weight"].tolist()), range(48), strict=True))
        channels = [factors[tuple(row)] for row in made["m.q_proj.weight"].tolist()]
        assert torch.equal(plain["m.q_norm.weight"], sources["self_attn.q_norm.weight"][channels])


@both_kinds
@pytest.mark.parametrize("head_dim", [8, 4])
def test_aligned_transfer_keeps_gates_and_decays_of_the_constructor(kind: str, head_dim: int) -> None:
    sources = draw_attention(PLAIN)
    plan = plan_for(PLAIN, SPECS[kind](head_dim=head_dim), "aligned", target="m")
    made = plan.apply(sources)
    random = plan_for(PLAIN, SPECS[kind](head_dim=head_dim), "random", target="m").apply(sources)
    carried = {f"m.{name}_proj.weight" for name in "qkvo"}
    assert {name for name in made if not torch.equal(made[name].float(), random[name])} == carried
    order = range(48)
    if head_dim == 4:
        order = [
            head * 8 + half * 4 + channel
            for kv_head in range(2)
            for half in range(2)
            for head in range(kv_head * 3, kv_head * 3 + 3)
            for channel in range(4)
        ]
    assert torch.equal(made["m.q_proj.weight"], sources["self_attn.q_proj.weight"][list(order)])
    assert torch.equal(made["m.o_proj.weight"], sources["self_attn.o_proj.weight"][:, list(order)])
    for name in ("k_proj", "v_proj"):
        assert torch.equal(made[f"m.{name}.weight"], sources[f"self_attn.{name}.weight"])
    heads = 6 * 8 // head_dim
    assert f"{heads} of {heads} heads pair the same slice" in plan.note


@both_kinds
def test_published_transfer_pairs_heads_by_their_remainder(kind: str) -> None:
    sources = draw_attention(PLAIN)
    spec = SPECS[kind](**PLAIN_READING, gate="none")
    plan = plan_for(PLAIN, spec, "published")
    mixer = build(plan, sources)
    with torch.no_grad():
        mixer.b_proj.weight.zero_()  # as it is for a gated delta net
        mixer.A_log.fill_(-math.inf)
        hidden_BLE = torch.randn(2, 11, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
        got = mixer(hidden_BLE)[0]
    expected = linear_attention(hidden_BLE, sources, PLAIN, 8, [math.inf] * 6, [head % 2 for head in range(6)])
    expected *= 0.5**4 / math.sqrt(8)  # β and three taps of 1/2
    assert float((got - expected).norm() / expected.norm()) < 1e-6
    assert plan.note == "4 of 6 heads pair the same slice of query, key, value and output"
    paper = AttentionGeometry(hidden_size=5120, num_heads=32, num_kv_heads=8, head_dim=128)
    assert plan_for(paper, spec, "published").note.startswith("4 of 32 heads")
    # Without groups, or with one, every head has its own anyway.
    for kv_heads in (1, 6):
        geometry = PLAIN.model_copy(update={"num_kv_heads": kv_heads})
        assert plan_for(geometry, spec, "published").note.startswith("6 of 6")


def test_published_transfer_sets_what_public_code_sets() -> None:
    sources = draw_attention(PLAIN)
    for kind, spec in SPECS.items():
        made = plan_for(PLAIN, spec(gate_bias=True), "published", target="m").apply(sources)
        random = plan_for(PLAIN, spec(gate_bias=True), "random", target="m").apply(sources)
        taps = made["m.conv1d.weight"]
        assert torch.equal(taps[..., -1], torch.full((80, 1), 0.5))
        assert not taps[..., :-1].any()
        decay = torch.exp(-torch.exp(made["m.A_log"][0]) * softplus(made["m.dt_bias"]))
        torch.testing.assert_close(decay, torch.full_like(decay, 0.9330), rtol=1e-4, atol=0)
        zero = {"a_proj", "b_proj", "g_proj"} if kind == "gated" else set()
        for name in zero:
            assert not made[f"m.{name}.weight"].any()
        drawn = set() if kind == "gated" else {"b_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"}
        for name in drawn:
            assert torch.equal(made[f"m.{name}.weight"], random[f"m.{name}.weight"])


@both_kinds
def test_neutral_memories_are_log_uniform_over_heads_and_spread_over_every_group(kind: str) -> None:
    geometry = AttentionGeometry(hidden_size=64, num_heads=32, num_kv_heads=8, head_dim=4)
    for head_dim, slices in ((4, 1), (2, 2)):
        plan = plan_for(geometry, SPECS[kind](head_dim=head_dim), "neutral", target="m")
        made = plan.apply(draw_attention(geometry))
        steps = softplus(made["m.dt_bias"].double()).view(32 * slices, -1)
        memories = 1 / (steps * made["m.A_log"].double().exp()[:, None])
        torch.testing.assert_close(memories, memories[:, :1].expand_as(memories))
        by_group = memories[:, 0].view(8, slices, 4)
        torch.testing.assert_close(by_group, by_group[:, :1].expand_as(by_group))  # slices of a head agree
        heads = by_group[:, 0].flatten().log().sort().values
        torch.testing.assert_close(heads, torch.linspace(math.log(16), math.log(4096), 32, dtype=torch.float64))
        spans = by_group[:, 0].max(dim=1).values / by_group[:, 0].min(dim=1).values
        assert float(spans.min()) > 50
    single = PLAIN.model_copy(update={"num_heads": 1, "num_kv_heads": 1})
    made = plan_for(single, SPECS[kind](), "neutral", target="m").apply(draw_attention(single))
    torch.testing.assert_close(1 / softplus(made["m.dt_bias"]), torch.full_like(made["m.dt_bias"], 256.0))


@both_kinds
def test_a_silu_gate_without_a_bias_stays_the_constructors(kind: str) -> None:
    sources = draw_attention(PLAIN)
    name = "m.g_proj.weight" if kind == "gated" else "m.g_b_proj.weight"
    plan = plan_for(PLAIN, SPECS[kind](gate="silu"), "neutral", target="m")
    random = plan_for(PLAIN, SPECS[kind](gate="silu"), "random", target="m")
    assert torch.equal(plan.apply(sources)[name], random.apply(sources)[name])
    opened = plan_for(PLAIN, SPECS[kind](gate="silu", gate_bias=True), "neutral", target="m").apply(sources)
    assert not opened[name].any()
    torch.testing.assert_close(silu(opened["m.gate_bias"].double()), torch.ones(48, dtype=torch.float64))


@pytest.mark.parametrize("head_dim", [8, 4])
def test_attention_gate_is_half_the_output_and_half_the_values_each_in_its_place(head_dim: int) -> None:
    sources = draw_attention(PLAIN)
    spec = GatedDeltaNetSpec(head_dim=head_dim, gate_bias=True)
    made = plan_for(PLAIN, spec, "attention_gate", target="m").apply(sources)
    neutral = plan_for(PLAIN, spec, "neutral", target="m").apply(sources)
    assert {name for name in made if not torch.equal(made[name], neutral[name])} == {"m.g_proj.weight"}
    values = made["m.v_proj.weight"].view(-1, head_dim, 24)
    groups = torch.arange(48 // head_dim) // 3
    expected = 0.5 * (made["m.o_proj.weight"].T + values[groups].reshape(48, 24))
    torch.testing.assert_close(made["m.g_proj.weight"].double(), expected)


@both_kinds
@pytest.mark.parametrize("init", ["aligned", "neutral", "attention_gate", "published", "random"])
def test_every_tensor_of_both_sides_is_accounted_for(kind: str, init: str) -> None:
    if (kind, init) == ("kimi", "attention_gate"):
        with pytest.raises(ValueError, match=r"mixer: .* low rank, so init 'attention_gate' cannot .* use init 'neut"):
            plan_for(PLAIN, SPECS[kind](), init)
        return
    for qk_norm in ("none", "head", "width"):
        geometry = AttentionGeometry(**SIZES, qkv_bias=True, output_bias=True, qk_norm=qk_norm)
        sources = draw_attention(geometry)
        plan = plan_for(geometry, SPECS[kind](gate_bias=True), init)
        mixer = build(plan, sources)
        assert [entry.target for entry in plan.entries] == [f"self_attn.mixer.{name}" for name in mixer.state_dict()]
        assert set(plan.used) | set(plan.dropped) == set(sources)
        assert set(plan.dropped) == (set(sources) if init == "random" else set())
        assert all(torch.isfinite(tensor).all() for tensor in mixer.state_dict().values())


@both_kinds
def test_what_the_spec_does_not_want_is_dropped_or_fresh(kind: str) -> None:
    geometry = AttentionGeometry(**SIZES, qkv_bias=True, output_bias=True, qk_norm="head")
    without = SPECS[kind](qkv_bias=False, output_bias=False, qk_norm="none")
    plan = plan_for(geometry, without, "aligned")
    lost = {f"self_attn.{name}_proj.bias" for name in "qkvo"} | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    assert set(plan.dropped) == lost
    more = SPECS[kind](qkv_bias=True, output_bias=True, qk_norm="width")
    made = plan_for(PLAIN, more, "aligned", target="m").apply(draw_attention(PLAIN))
    for name in "qkvo":
        assert not made[f"m.{name}_proj.bias"].any()
    assert torch.equal(made["m.q_norm.weight"], torch.ones(48))
    assert torch.equal(made["m.k_norm.weight"], torch.ones(16))


@both_kinds
def test_rows_of_a_fused_projection_are_reordered_too(kind: str) -> None:
    sources = draw_attention(PLAIN)
    fused = torch.cat([sources[f"self_attn.{name}_proj.weight"] for name in "vqk"])
    parts = (
        Projection("qkv", tuple(range(16, 64)), "queries"),
        Projection("qkv", tuple(range(64, 80)), "keys"),
        Projection("qkv", tuple(range(16)), "values"),
        Projection("o_proj"),
    )
    plan = plan_for(PLAIN, SPECS[kind](head_dim=4), "neutral", projections=parts)
    got = plan.apply({"self_attn.qkv.weight": fused, "self_attn.o_proj.weight": sources["self_attn.o_proj.weight"]})
    expected = plan_for(PLAIN, SPECS[kind](head_dim=4), "neutral").apply(sources)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_plan_reads_like_sentences() -> None:
    lines = str(plan_for(PLAIN, GatedDeltaNetSpec(gate="sigmoid"), "neutral", source="attn", target="m")).splitlines()
    assert "m.q_proj.weight [48 x 24] = attn.q_proj.weight, as it lies" in lines
    assert "m.b_proj.weight [6 x 24] = set: 0, so that β is 1/2 for every token" in lines
    assert "m.o_proj.weight [24 x 48] = attn.o_proj.weight, as it lies" in lines
    assert "m.g_proj.weight [48 x 24] = set: 0, a gate of 1/2 for every token" in lines
    assert "m.conv1d.weight [80 x 1 x 4] = set: 1 at the newest tap, 0 elsewhere" in lines
    assert lines[-1] == "6 of 6 heads pair the same slice of query, key, value and output"
    lines = str(plan_for(PLAIN, KimiDeltaAttentionSpec(), "published", source="attn", target="m")).splitlines()
    assert "m.q_proj.weight [48 x 24] = the rows of attn.q_proj.weight, heads ordered by their number mod 2" in lines
    assert "m.A_log [6] = set: log(0.1)" in lines
    assert "m.f_a_proj.weight [8 x 24] = init: normal(0, 0.02)" in lines


@both_kinds
@pytest.mark.parametrize(
    ("changes", "init", "message"),
    [
        ({"head_dim": 3, "num_heads": 16, "num_groups": 8}, "aligned", r"layer.head_dim: 3 does not divide the te"),
        ({"num_heads": 12}, "aligned", r"layer.num_heads: 12 x head_dim 8 differs from the teacher's 48 channels"),
        ({"num_groups": 3}, "neutral", r"layer.num_groups: 3 x head_dim 8 differs from .* leave num_groups open"),
        ({"head_dim": 4}, "published", r"layer.head_dim: 4 differs from the teacher's 8, .* leave head_dim open"),
    ],
)
def test_sizes_that_do_not_fit_are_named(kind: str, changes: dict[str, int], init: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_for(PLAIN, SPECS[kind](**changes), init, place="layer")
    plan_for(PLAIN, SPECS[kind](**changes), "random", place="layer")


@both_kinds
def test_a_norm_of_heads_does_not_fit_slices(kind: str) -> None:
    geometry = AttentionGeometry(**SIZES, qk_norm="head")
    with pytest.raises(ValueError, match=r"layer.qk_norm: .* heads of width 8, but the mixer's have head_dim 4; set"):
        plan_for(geometry, SPECS[kind](head_dim=4), "aligned", place="layer")
    with pytest.raises(ValueError, match=r"layer.qk_norm: 'width' differs from the teacher's 'head'"):
        plan_for(geometry, SPECS[kind](qk_norm="width"), "aligned", place="layer")
    plan_for(geometry, SPECS[kind](head_dim=4, qk_norm="none"), "aligned", place="layer")


def test_a_gate_is_needed_for_attention_gate() -> None:
    with pytest.raises(ValueError, match=r"layer.gate: 'none' leaves init 'attention_gate' nothing to make"):
        plan_for(PLAIN, GatedDeltaNetSpec(gate="none"), "attention_gate", place="layer")

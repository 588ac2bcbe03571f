"""One layer's transfer: aligned is linear attention in the teacher's own pairing; nothing is lost."""

import math

import pytest
import torch
from torch.nn.functional import silu

from hybridize.mixers import build_mixer
from hybridize.models import Projection
from hybridize.spec import AttentionGeometry, AttentionSpec, Mamba1Spec
from hybridize.transfer import INITS, aligned_order, count_aligned, plan_transfer

GEOMETRY = AttentionGeometry(hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=8)
PAPER = AttentionGeometry(hidden_size=5120, num_heads=32, num_kv_heads=8, head_dim=128)


def draw_attention(geometry=GEOMETRY, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "q_proj": geometry.num_heads * geometry.head_dim,
        "k_proj": geometry.num_kv_heads * geometry.head_dim,
        "v_proj": geometry.num_kv_heads * geometry.head_dim,
    }
    tensors = {
        f"self_attn.{name}.weight": torch.randn(count, geometry.hidden_size, generator=generator) / 5
        for name, count in rows.items()
    }
    width = geometry.num_heads * geometry.head_dim
    tensors["self_attn.o_proj.weight"] = torch.randn(geometry.hidden_size, width, generator=generator) / 5
    return tensors


@torch.no_grad()
def neutral_mixer(plan, sources, gate_E):
    """The mixer with no decay, step 1, a convolution that passes x through, and one gate for all channels."""
    mixer = build_mixer(plan.spec, plan.hidden_size)
    made = plan.apply(sources)
    mixer.load_state_dict({name.removeprefix(f"{plan.prefix}."): tensor for name, tensor in made.items()})
    mixer.A_log.fill_(-math.inf)
    mixer.D.zero_()
    mixer.dt_in_proj.weight.zero_()
    mixer.dt_proj.bias.fill_(math.log(math.e - 1))
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, :, -1] = 1
    mixer.conv1d.bias.zero_()
    mixer.in_proj.weight[: plan.spec.d_inner] = gate_E
    return mixer


def linear_attention(hidden_BLE, sources, geometry, slice_width, gate_E):
    """The teacher's attention without softmax and scale, its scores taken slice by slice."""
    query, key, value = (
        (hidden_BLE @ sources[f"self_attn.{name}.weight"].T).unflatten(-1, (-1, geometry.head_dim))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    outputs = []
    for head in range(geometry.num_heads):
        kv_head = head // (geometry.num_heads // geometry.num_kv_heads)
        for first in range(0, geometry.head_dim, slice_width):
            part = slice(first, first + slice_width)
            scores_BTS = (query[:, :, head, part] @ key[:, :, kv_head, part].transpose(1, 2)).tril()
            outputs.append(scores_BTS @ silu(value[:, :, kv_head, part]))
    gated = torch.cat(outputs, dim=-1) * silu(hidden_BLE @ gate_E)[..., None]
    return gated @ sources["self_attn.o_proj.weight"].T


def compare(init, state_size):
    sources = draw_attention()
    gate_E = torch.randn(24, generator=torch.Generator().manual_seed(7))
    hidden_BLE = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(8))
    plan = plan_transfer(GEOMETRY, Mamba1Spec(state_size=state_size), init)
    with torch.no_grad():
        mixed, _ = neutral_mixer(plan, sources, gate_E)(hidden_BLE)
    return mixed, linear_attention(hidden_BLE, sources, GEOMETRY, state_size, gate_E)


@pytest.mark.parametrize("state_size", [8, 4, 2, 1])
def test_aligned_transfer_is_linear_attention_over_matching_slices(state_size):
    mixed, expected = compare("aligned", state_size)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)


def test_published_transfer_is_linear_attention_only_where_one_slice_is_the_head():
    mixed, expected = compare("published", 8)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    for state_size in (4, 2):
        mixed, expected = compare("published", state_size)
        assert (mixed - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("geometry", "state_size", "published", "total"),
    [(PAPER, 16, 32, 256), (PAPER, 128, 32, 32), (GEOMETRY, 8, 6, 6), (GEOMETRY, 4, 8, 12)],
)
def test_published_order_aligns_only_a_fraction_of_the_heads(geometry, state_size, published, total):
    assert count_aligned(geometry, state_size, None) == (published, total)
    order = aligned_order(geometry, state_size)
    assert count_aligned(geometry, state_size, order) == (total, total)
    assert sorted(order) == list(range(geometry.num_heads * geometry.head_dim))


@pytest.mark.parametrize("init", ["aligned", "published"])
def test_inits_transfer_the_same_rows(init):
    sources = draw_attention()
    made = plan_transfer(GEOMETRY, Mamba1Spec(state_size=4), init).apply(sources)
    gate, x, b, c = made["self_attn.mixer.in_proj.weight"].split([48, 16, 16, 48])
    assert torch.equal(x, sources["self_attn.v_proj.weight"])
    assert torch.equal(b, sources["self_attn.k_proj.weight"])
    order = list(range(48)) if init == "published" else list(aligned_order(GEOMETRY, 4))
    assert torch.equal(c, sources["self_attn.q_proj.weight"][order])
    assert torch.equal(made["self_attn.mixer.out_proj.weight"], sources["self_attn.o_proj.weight"][:, order])
    assert gate.std() == pytest.approx(0.02, rel=0.2)


def test_what_has_no_counterpart_is_initialised_as_the_plan_says():
    spec = Mamba1Spec(state_size=4, dt_min=0.01, dt_max=0.2)
    for init in ("aligned", "published", "random"):
        made = plan_transfer(GEOMETRY, spec, init, target="m").apply(draw_attention())
        assert torch.equal(made["m.A_log"], torch.arange(1.0, 5).log().expand(48, 4))
        assert torch.equal(made["m.D"], torch.ones(48))
        steps = torch.nn.functional.softplus(made["m.dt_proj.bias"])
        assert steps.min() >= 0.01 * 0.99
        assert steps.max() <= 0.2 * 1.01
        assert made["m.dt_proj.weight"].abs().max() <= spec.resolve(GEOMETRY).dt_rank ** -0.5
        assert made["m.conv1d.weight"].abs().max() <= 0.5
        assert made["m.conv1d.weight"].abs().max() > 0.4


@pytest.mark.parametrize("init", INITS)
def test_every_tensor_of_both_sides_is_accounted_for(init):
    plan = plan_transfer(GEOMETRY, Mamba1Spec(state_size=4), init)
    mixer = build_mixer(plan.spec, 24)
    assert [entry.target for entry in plan.entries] == [f"self_attn.mixer.{name}" for name in mixer.state_dict()]
    assert {entry.shape for entry in plan.entries} == {tuple(tensor.shape) for tensor in mixer.state_dict().values()}
    assert set(plan.used) | set(plan.dropped) == set(draw_attention())
    assert not set(plan.used) & set(plan.dropped)
    assert (init == "random") == bool(plan.dropped)


def test_plan_reads_like_sentences():
    lines = str(plan_transfer(GEOMETRY, Mamba1Spec(state_size=4), source="attn", target="m")).splitlines()
    assert (
        "m.in_proj.weight [128 x 24] = rows 0..47 (z) init: normal(0, 0.02); rows 48..63 (x) "
        "attn.v_proj.weight, as it lies; rows 64..79 (B) attn.k_proj.weight, as it lies; rows 80..127 (C) "
        "the rows of attn.q_proj.weight, in slices of 4, ordered by key/value head, slice and query head"
    ) in lines
    assert "m.A_log [48 x 4] = init: log(1..4) in every channel" in lines
    assert lines[-1] == "12 of 12 scan heads pair the same slice of query, key, value and output"
    published = str(plan_transfer(GEOMETRY, Mamba1Spec(state_size=4), "published"))
    assert published.endswith("\n8 of 12 scan heads pair the same slice of query, key, value and output")
    dropped = str(plan_transfer(GEOMETRY, Mamba1Spec(), "random", source="attn"))
    assert "attn.q_proj.weight: dropped, since init 'random' carries nothing over" in dropped


def test_draws_follow_the_generator_and_leave_the_global_one_alone():
    plan = plan_transfer(GEOMETRY, Mamba1Spec(state_size=4))
    before = torch.get_rng_state()
    first, second, other = (plan.apply(draw_attention(), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    name = "self_attn.mixer.in_proj.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


def test_carried_tensors_keep_the_teachers_dtype():
    sources = {name: tensor.to(torch.bfloat16) for name, tensor in draw_attention().items()}
    made = plan_transfer(GEOMETRY, Mamba1Spec(state_size=4), target="m").apply(sources)
    assert made["m.in_proj.weight"].dtype == torch.bfloat16
    assert made["m.A_log"].dtype == torch.float32


@pytest.mark.parametrize("init", INITS)
def test_biases_and_norms_are_dropped_with_a_reason(init):
    geometry = AttentionGeometry(**GEOMETRY.model_dump() | {"qkv_bias": True, "output_bias": True, "qk_norm": "head"})
    spec = Mamba1Spec(state_size=4, qkv_bias=False, output_bias=False, qk_norm="none")
    extras = {f"self_attn.{part}_proj.bias" for part in "qkvo"} | {f"self_attn.{part}_norm.weight" for part in "qk"}
    plan = plan_transfer(geometry, spec, init, norms=("q_norm", "k_norm"))
    if init == "random":
        assert plan.dropped.keys() == set(draw_attention()) | extras
    else:
        assert plan.dropped.keys() == extras
        assert "self_attn.o_proj.bias: dropped, since the mamba1 mixer is to have no such bias" in str(plan)
        assert "q_norm.weight: dropped, since the mamba1 mixer is not to normalise what stands for queries" in str(plan)


def test_tensor_without_a_place_is_an_error_and_dropped_by_random():
    names = [*draw_attention(), "self_attn.q_norm.weight"]
    spec = Mamba1Spec(state_size=4)
    for init in ("aligned", "published"):
        with pytest.raises(ValueError, match=r"self_attn\.q_norm\.weight: a mamba1 mixer has no place .*'random'"):
            plan_transfer(GEOMETRY, spec, init, source_tensors=names)
    assert "self_attn.q_norm.weight" in plan_transfer(GEOMETRY, spec, "random", source_tensors=names).dropped


FUSED = {
    "kind": (range(48), range(48, 64), range(64, 80)),
    "scattered": (range(79, 31, -1), range(0, 32, 2), range(1, 32, 2)),
}


@pytest.mark.parametrize("init", ["aligned", "published"])
@pytest.mark.parametrize("lie", FUSED)
def test_fused_projection_transfers_as_separate_ones_do(init, lie):
    sources = draw_attention()
    expected = plan_transfer(GEOMETRY, Mamba1Spec(state_size=4), init).apply(sources)
    qkv = torch.empty(80, 24)
    parts = []
    for rows, name, what in zip(FUSED[lie], ("q_proj", "k_proj", "v_proj"), ("queries", "keys", "values"), strict=True):
        qkv[list(rows)] = sources[f"self_attn.{name}.weight"]
        parts.append(Projection("qkv", tuple(rows), what))
    fused = {"self_attn.qkv.weight": qkv, "self_attn.dense.weight": sources["self_attn.o_proj.weight"]}
    plan = plan_transfer(GEOMETRY, Mamba1Spec(state_size=4), init, projections=(*parts, "dense"))
    assert set(plan.used) == set(fused)
    made = plan.apply(fused)
    for name, tensor in expected.items():
        assert torch.equal(made[name], tensor), name
    if lie == "kind":
        assert "(x) the rows of self_attn.qkv.weight, 64..79 (its values)" in str(plan)


@pytest.mark.parametrize(
    ("spec", "init", "message"),
    [
        (
            Mamba1Spec(state_size=3, d_inner=48, d_xb=24),
            "aligned",
            r"mixer\.d_xb: 24 differs from .* 16 .*'random'",
        ),
        (
            Mamba1Spec(state_size=4, d_inner=96),
            "published",
            r"mixer\.d_inner: 96 differs from .* 48 .*'random'",
        ),
        (
            Mamba1Spec(state_size=16),
            "aligned",
            r"16 does not divide the teacher's head width 8.*divisor of 8",
        ),
        (Mamba1Spec(), "mil", rf"init: 'mil' is unknown; use one of {', '.join(INITS)}"),
        (AttentionSpec(), "aligned", r"the layer is to be 'attention'; leave it out"),
    ],
)
def test_misfits_are_named_with_a_remedy(spec, init, message):
    with pytest.raises(ValueError, match=message):
        plan_transfer(GEOMETRY, spec, init)


def test_absent_and_misshapen_sources_are_named():
    plan = plan_transfer(GEOMETRY, Mamba1Spec(state_size=4))
    sources = draw_attention()
    key = sources.pop("self_attn.k_proj.weight")
    with pytest.raises(ValueError, match=r"tensors lack self_attn\.k_proj\.weight"):
        plan.apply(sources)
    with pytest.raises(ValueError, match=r"in_proj\.weight: it comes out as \[120, 24\].*needs \[128, 24\]"):
        plan.apply(sources | {"self_attn.k_proj.weight": key[:8]})
    with pytest.raises(ValueError, match=r"self_attn\.v_proj\.weight: not among the teacher's tensors"):
        plan_transfer(
            GEOMETRY,
            Mamba1Spec(state_size=4),
            source_tensors=[name for name in draw_attention() if "v_proj" not in name],
        )

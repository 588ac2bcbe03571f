"""Exports: transformers' own class computes what the hybrid computes, or the export is refused and says why."""

import inspect
import json
import re

import pytest
import torch
from export_cases import GATED_DELTA, save_case
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.granitemoehybrid import modeling_granitemoehybrid

from hybridize.models import export_native, geometry_of, hybrid_config_class, load_model
from hybridize.models.contents import hybrid_shapes
from hybridize.models.exports import FORMATS
from hybridize.models.exports.granite import attention_heads
from hybridize.models.exports.norms import split_pair, split_weight
from hybridize.models.exports.pieces import Pieces, place_blocks, scaled
from hybridize.spec import AttentionGeometry, AttentionSpec, LayoutSpec, Mamba1Spec, Mamba2Spec, SlidingWindowSpec

# Before 5.23 transformers' class takes the norm over all channels, whatever the groups; vLLM's never did.
NORM_BY_GROUP = "group_size" in inspect.signature(modeling_granitemoehybrid.GraniteMoeHybridRMSNormGated).parameters
needs_norm_by_group = pytest.mark.skipif(not NORM_BY_GROUP, reason="transformers before 5.23 norms over all groups")

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
PAPER = {**HEADS, "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 14336, "sliding_window": None}
LLAMA_8B = {**HEADS, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
QWEN_8B = {**HEADS, "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 3.0,
}


def export(tmp_path, *case, form=None, **changes):
    """Export a random hybrid; both folders and what the export says."""
    source = save_case(tmp_path / "hybrid", *case, **changes)
    return source, tmp_path / "exported", export_native(source, tmp_path / "exported", form)


def draw_tokens(*shape):
    return torch.randint(2, 61, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_same(source, exported, architecture, atol):
    """Both folders give the same logits, at once and token by token, in fp64 as far as transformers' class goes."""
    hybrid = load_model(source, dtype=torch.float64)
    model, report = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64, output_loading_info=True)
    assert type(model).__name__ == architecture
    assert not any(report.values()), report
    tokens_BL = draw_tokens(2, 70)
    expected = hybrid(tokens_BL, use_cache=False).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(model.eval()(tokens_BL, use_cache=False).logits, expected, atol=atol, rtol=0)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in tokens_BL.split([60, *[1] * 10], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=atol, rtol=0)


@needs_norm_by_group
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (("llama", "a22a"), {"tie_word_embeddings": True}),
        (("llama", "2a22"), {"attention_bias": True}),
        (("llama", "a2"), {"rope_parameters": YARN}),
        (("llama", "a2"), {"rope_parameters": LLAMA3}),
        (("mistral", "a2"), {"sliding_window": None, "rope_parameters": LINEAR}),
        (("qwen2", "a2"), {}),
        (("granite", "a2a"), {**GRANITE, "attention_bias": True}),
        (("llama", "a2"), {"hidden_size": 48}),  # query heads of zeros, and mixers' heads of zeros
        (("llama", "a2"), {"hidden_size": 40, "attention_bias": True}),  # key/value heads twice
        (("llama", "a2"), {"hidden_size": 64, "num_key_value_heads": 4, "num_attention_heads": 4}),
        (("llama", "a2"), {"num_key_value_heads": 1, "blocks": {"2": Mamba2Spec(state_size=4, head_dim=8)}}),
        (("llama", "a2"), {"blocks": {"2": Mamba2Spec(state_size=16, head_dim=4, num_heads=16, num_groups=2)}}),
        (("llama", "a2"), {"blocks": {"2": Mamba2Spec(state_size=8, gate_bias=True, conv_kernel=3)}}),
        (("llama", "a2"), {"blocks": {"2": Mamba2Spec(state_size=8, output_bias=True)}}),
        (("llama", "a23"), {"blocks": {"3": Mamba2Spec(state_size=8, num_heads=2, num_groups=1, qkv_bias=True)}}),
    ],
)
def test_mamba2_hybrid_is_the_same_as_granite_moe_hybrid(tmp_path, case, changes):
    source, exported, report = export(tmp_path, *case, **changes)
    assert report["form"] == "granite-hybrid"
    check_same(source, exported, "GraniteMoeHybridForCausalLM", atol=2e-5)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (("qwen3", "gaag"), {"tie_word_embeddings": True}),
        (("qwen3", "ag"), {"num_key_value_heads": 1, "rope_parameters": YARN}),
        (("qwen3", "ga"), {"head_dim": 16, "rope_parameters": LLAMA3}),
        (("qwen3", "ag"), {"blocks": {"g": GATED_DELTA.model_copy(update={"conv_kernel": 3, "head_dim": 4})}}),
    ],
)
def test_gated_delta_hybrid_is_the_same_as_qwen35(tmp_path, case, changes):
    source, exported, report = export(tmp_path, *case, **changes)
    assert report["form"] == "qwen3.5"
    check_same(source, exported, "Qwen3_5ForCausalLM", atol=1e-4)  # their delta rule is fp32 whatever the dtype


def test_bf16_weights_are_the_same_in_both_but_for_norms_that_no_power_of_two_saves(tmp_path):
    source, _, report = export(tmp_path, "qwen3", "aga", dtype=torch.bfloat16)
    rounded = [note for note in report["notes"] if "are rounded" in note]
    assert len(rounded) == 1
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "q_norm" in name or "k_norm" in name:
            tensors[name] = 0.5 + tensors[name].abs()
            tensors[name][[0, 4]] = torch.tensor([0.05, 0.06] if "q_norm" in name else [20.0, 18.0]).bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = export_native(source, tmp_path / "again")
    assert not [note for note in report["notes"] if "are rounded" in note]
    check_same(source, tmp_path / "again", "Qwen3_5ForCausalLM", atol=1e-4)


def test_export_says_what_it_costs(tmp_path):
    _, exported, report = export(tmp_path, "llama", "a2", hidden_size=48)
    assert report["notes"] == ["4 query heads become 6, with zeros", "4 heads of a mixer become 6, with zeros"]
    sizes = [tensor.numel() for tensor in load_file(exported / "model.safetensors").values()]
    own = [tensor.numel() for tensor in load_file(tmp_path / "hybrid" / "model.safetensors").values()]
    assert report["num_added"] == sum(sizes) - sum(own) > 0
    (tmp_path / "plain").mkdir()
    assert export(tmp_path / "plain", "llama", "a2")[2]["notes"] == []


def test_last_norm_may_untie_the_head(tmp_path):
    _, exported, report = export(tmp_path, "qwen3", "ag", tie_word_embeddings=True)
    assert "no longer tied" in report["notes"][0]
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(exported / "model.safetensors")


def test_config_names_what_vllm_looks_up(tmp_path):
    _, exported, _ = export(tmp_path, "llama", "a2", dtype=torch.bfloat16)
    fields = json.loads((exported / "config.json").read_text())
    assert fields["architectures"] == ["GraniteMoeHybridForCausalLM"]
    assert fields["layer_types"] == ["full_attention", "linear_attention"]
    assert (fields["position_embedding_type"], fields["num_local_experts"]) == ("rope", 0)
    assert fields["dtype"] == "bfloat16"
    (tmp_path / "qwen").mkdir()
    _, exported, _ = export(tmp_path / "qwen", "qwen3", "ag")
    fields = json.loads((exported / "config.json").read_text())
    assert fields["architectures"] == ["Qwen3_5ForCausalLM"]
    assert (fields["model_type"], fields["mamba_ssm_dtype"]) == ("qwen3_5_text", "float32")
    assert fields["rope_parameters"]["partial_rotary_factor"] == 1.0
    assert "hybridize" not in json.dumps(fields) + " ".join(load_file(exported / "model.safetensors"))


def test_shards_and_companions_are_written(tmp_path):
    source = save_case(tmp_path / "hybrid", "llama", "a22a")
    (source / "tokenizer.json").write_text("{}")
    report = export_native(source, tmp_path / "many", max_shard_bytes=20_000)
    export_native(source, tmp_path / "one")
    assert report["num_shards"] > 1
    parts = {}
    for file in (tmp_path / "many").glob("*.safetensors"):
        parts |= load_file(file)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert (tmp_path / "many" / "tokenizer.json").read_text() == "{}"


class ShapesAlone:
    """Stands for a folder's tensors that are too many to make: shapes, and ones where values are asked for."""

    def __init__(self, config):
        self.shapes, _ = hybrid_shapes(config)
        self.metas = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}

    def copy(self, name):
        return torch.ones(self.shapes[name])


@pytest.mark.parametrize(
    ("family", "form", "word", "mixer", "sizes", "percent"),
    [
        ("mistral", "granite-hybrid", "2222a" * 10, Mamba2Spec(), PAPER, 15.3),
        ("mistral", "granite-hybrid", "2222a" * 10, Mamba2Spec(state_size=16, head_dim=128), PAPER, 10.0),
        ("llama", "granite-hybrid", "222a" * 8, Mamba2Spec(), LLAMA_8B, 7.2),
        ("qwen3", "qwen3.5", "ggga" * 9, GATED_DELTA, QWEN_8B, 9.6),
    ],
)
def test_large_shapes_cost_what_the_documentation_says(family, form, word, mixer, sizes, percent):
    config = hybrid_config_class(family)(**sizes, num_hidden_layers=len(word), tie_word_embeddings=False)
    layers = [AttentionSpec() if letter == "a" else mixer for letter in word]
    config.set_layout(LayoutSpec(layers=tuple(layers)).resolve(geometry_of(config)))
    pieces = Pieces(ShapesAlone(config))
    assert FORMATS[form].obstacles(config) == []
    FORMATS[form].plan(config, pieces)
    own, written = (sum(meta.numel() for meta in metas.values()) for metas in (pieces.stored.metas, pieces.metas))
    assert 100 * (written / own - 1) == pytest.approx(percent, abs=0.05)


# --- what is refused ---


@pytest.mark.parametrize(
    ("case", "changes", "messages"),
    [
        (
            ("llama", "amm2"),
            {"blocks": {"m": Mamba1Spec(state_size=4)}},
            [
                "not as granite-hybrid, since mixers[1, 2]: the layer is a mamba1, but it can only be attention or mam",
                "not as qwen3.5, since model_type: a llama has no norm",
            ],
        ),
        (
            ("llama", "as2"),
            {"blocks": {"s": SlidingWindowSpec(window=4)}},
            ["mixers[1]: the layer is a sliding_window"],
        ),
        (("mistral", "a2"), {"sliding_window": 4}, ["mixers[0]: its attention is sliding_attention"]),
        (("qwen3", "a2"), {}, ["not as granite-hybrid, since model_type: a qwen3 has norms of queries and keys"]),
        (
            ("qwen3", "ag"),
            {"blocks": {"g": GATED_DELTA.model_copy(update={"qk_norm": None})}},
            ["mixers[1].qk_norm: it"],
        ),
        (
            ("qwen3", "ag"),
            {"attention_bias": True},
            ["mixers[1].qkv_bias: it is True", "attention_bias: attention has"],
        ),
        (
            ("qwen3", "agg"),
            {"blocks": {"g": GATED_DELTA.model_copy(update={"gate": "sigmoid", "l2_norm": False})}},
            ["mixers[1, 2].gate: it is 'sigmoid', but the gate there is SiLU; only 'silu' can", "mixers[1, 2].l2_norm"],
        ),
        (
            ("llama", "a22"),
            {"blocks": {"2": Mamba2Spec(state_size=8, gate_norm=False, conv_activation="none")}},
            ["mixers[1, 2].gate_norm: it is False", "mixers[1, 2].conv_activation: it is 'none'"],
        ),
        (
            ("llama", "a23"),
            {"blocks": {"3": Mamba2Spec(state_size=4, head_dim=8)}},
            ["mixers[2].state_size: it is 4, but 8 elsewhere, and all must be alike"],
        ),
        (("llama", "22"), {}, ["mixers: it needs at least one layer of attention and one mamba2"]),
        (("llama", "aa"), {}, ["mixers: it needs at least one layer of attention and one mamba2"]),
        (("llama", "a2"), {"mlp_bias": True}, ["mlp_bias: the MLPs have biases"]),
        (("llama", "a2"), {"hidden_act": "gelu"}, ["hidden_act: it is 'gelu'"]),
        (("llama", "a2"), {"hidden_size": 24}, ["head_dim: 4 query and 2 key/value heads of 8 have no room"]),
        (("gemma2", "a2"), {}, ["model_type: a gemma2"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_layer_and_the_reason(tmp_path, case, changes, messages):
    source = save_case(tmp_path / "hybrid", *case, **changes)
    with pytest.raises(
        ValueError, match=re.escape(f"{source}/config.json: vLLM cannot serve this hybrid by")
    ) as caught:
        export_native(source, tmp_path / "exported")
    for message in messages:
        assert message in str(caught.value)
    assert "Serve the folder as it is, with the plugin" in str(caught.value)
    assert not (tmp_path / "exported").exists()


def test_one_format_asked_for_is_the_only_one_tried(tmp_path):
    source = save_case(tmp_path / "hybrid", "llama", "a2")
    with pytest.raises(ValueError, match=r"not as qwen3\.5") as caught:
        export_native(source, tmp_path / "exported", "qwen3.5")
    assert "granite-hybrid" not in str(caught.value)


def test_norm_eps_of_its_own_is_refused(tmp_path):
    source = save_case(tmp_path / "hybrid", "llama", "a2")
    fields = json.loads((source / "config.json").read_text())
    fields["mixers"][1]["norm_eps"] = 1e-3
    (source / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"mixers\[1\]\.norm_eps: it is 0\.001"):
        export_native(source, tmp_path / "exported")


@pytest.mark.parametrize(
    ("change", "message"),
    [("lacks", "tensors are missing"), ("more", "belong to no part"), ("shape", r"mixer\.D \[1\], not \[4\]")],
)
def test_tensors_that_the_config_does_not_say_are_refused(tmp_path, change, message):
    source = save_case(tmp_path / "hybrid", "llama", "a2")
    tensors = load_file(source / "model.safetensors")
    if change == "lacks":
        del tensors["model.layers.1.self_attn.mixer.D"]
    elif change == "more":
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(2)
    else:
        tensors["model.layers.1.self_attn.mixer.D"] = torch.zeros(1)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        export_native(source, tmp_path / "exported")


def test_teacher_and_full_folder_are_refused(tmp_path, teacher):
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="which is no hybrid's"):
        export_native(tmp_path / "teacher", tmp_path / "exported")
    with pytest.raises(ValueError, match="exists already"):
        export_native(tmp_path / "teacher", tmp_path / "teacher")


# --- parts ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_less_one_and_power_of_two_give_every_weight_back(dtype):
    weight = torch.tensor([0.0, 1.0, 0.01, -0.3, 0.499, 0.5, 1.99, 300.0, 7e-5, -1.0, 3.0, 257.3]).to(dtype)
    stored, factor = split_weight(weight)
    assert stored.dtype == dtype
    assert torch.equal((1 + stored.float()) * factor, weight.float())
    assert torch.equal(factor.abs().log2(), factor.abs().log2().round())
    assert factor[[0, 1, 5, 6, 10]].eq(1).all()
    assert not torch.equal(1 + (weight.float() - 1).to(dtype).float(), weight.float())  # without it they would be lost


def test_pair_of_norms_shares_one_power_of_two():
    query = torch.tensor([0.03, 1.0, 0.25, 0.02, 1.5, 0.3]).bfloat16()
    key = torch.tensor([90.0, 1.0, 4.0, 60.0, 2.0, 0.1]).bfloat16()
    stored_query, stored_key, num_rounded = split_pair(query, key)
    shifts = (1 + stored_query.float()) / query.float()
    assert torch.equal(shifts[[0, 1]], shifts[[3, 4]])  # channels that turn together
    assert shifts[0] > 1
    assert shifts[1] == 1
    product = (1 + stored_query.float()) * (1 + stored_key.float())
    exact = torch.tensor([True, True, False, True, True, False])
    assert torch.equal(product[exact], (query.float() * key.float())[exact])
    assert 0 < num_rounded <= 3  # 0.3 with 0.1 is beyond help, whatever its partners
    torch.testing.assert_close(product, query.float() * key.float(), atol=0.01, rtol=0)


def test_blocks_are_placed_copied_and_left_out():
    rows = torch.arange(6.0).view(6, 1) + 1
    assert place_blocks(rows, [2, None, 0, 0], 2).flatten().tolist() == [5, 6, 0, 0, 1, 2, 1, 2]
    assert place_blocks(rows.T, [1, None], 3, 1).flatten().tolist() == [4, 5, 6, 0, 0, 0]
    assert place_blocks(rows, [0, 1, 2], 2) is rows


@pytest.mark.parametrize("value", [60000.0, float("nan")])
def test_scaling_that_would_round_is_refused(value):
    with pytest.raises(ValueError, match="o_proj: it holds numbers that are too large or too small"):
        scaled(torch.tensor([1.0, value]).half(), torch.tensor(2.0), "o_proj")


def test_attention_heads_keep_their_key_heads_and_their_number_small():
    def heads(hidden_size, num_heads, num_kv_heads, head_dim=128):
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        return attention_heads(AttentionGeometry(**sizes, head_dim=head_dim))

    plain = heads(4096, 32, 8)
    assert (plain.queries, plain.keys) == (list(range(32)), list(range(8)))
    paper = heads(5120, 32, 8)  # the shape of arXiv 2511.02651: one query head of zeros behind each key/value head
    assert (len(paper.queries), paper.keys) == (40, list(range(8)))
    assert paper.queries[:5] == [0, 1, 2, 3, None]
    copied = heads(5 * 128, 4, 2)
    assert (copied.queries, copied.keys) == ([0, 1, 2, 3, None], [0, 0, 1, 1, None])
    assert heads(1024, 16, 8) is None
    assert heads(1000, 4, 2) is None


def test_cases_leave_no_parameter_at_a_value_that_hides_errors(tmp_path):
    for family, word in (("llama", "a2"), ("qwen3", "ag")):
        tensors = load_file(save_case(tmp_path / family, family, word, attention_bias=False) / "model.safetensors")
        assert all(tensor.std() > 0.02 for tensor in tensors.values())


def test_an_unknown_format_is_named(tmp_path):
    source = save_case(tmp_path / "hybrid", "llama", "a2")
    with pytest.raises(ValueError, match=r"'bamba' is unknown; use one of granite-hybrid, qwen3\.5"):
        export_native(source, tmp_path / "out", "bamba")

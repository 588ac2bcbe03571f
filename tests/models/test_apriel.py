"""Apriel-H1's format: what is read and written computes the published formula, and every bit is accounted for."""

import pytest
import torch
from apriel_format import (
    FFN,
    MIXED,
    RANK,
    TAPS,
    D,
    E,
    N,
    X,
    draw_tokens,
    edit_config,
    edit_tensors,
    published_logits,
    read_config,
    read_tensors,
    write_checkpoint,
)

from hybridize.models import convert_model, geometry_of, layout_of, load_model, save_hybrid, stored
from hybridize.models.apriel import conversion, export_apriel, import_apriel
from hybridize.spec import AttentionSpec, GatedDeltaNetSpec, LayoutSpec, Mamba1Spec, SlidingWindowSpec

PLAIN = Mamba1Spec(state_size=4)


def hybrid_logits(folder, tokens_L):
    with torch.no_grad():
        return load_model(folder, dtype=torch.float64)(tokens_L[None], use_cache=False).logits[0]


def save_made_hybrid(folder, make_teacher, layers, family="mistral", **changes):
    """A hybrid of this package's making whose weights are all off their initial values."""
    teacher = make_teacher(family, num_hidden_layers=len(layers), sliding_window=None, **changes)
    torch.manual_seed(2)
    hybrid = convert_model(teacher, LayoutSpec(layers=tuple(layers)))
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_hybrid(hybrid, None, folder)
    return folder


# --- reading ---


@pytest.mark.parametrize(
    ("blocks", "fused", "num_files"),
    [(MIXED, False, 1), (MIXED, True, 3), (["m2", "m2"], False, 3), (["m2", "m2"], True, 1), (["i", "t"], False, 1)],
)
def test_imported_checkpoint_computes_the_published_formula(tmp_path, blocks, fused, num_files):
    source = write_checkpoint(tmp_path / "source", blocks, fused=fused, num_files=num_files)
    report = import_apriel(source, tmp_path / "out", max_shard_bytes=20_000 if num_files > 1 else 5_000_000_000)
    assert report["layout"] == "".join({"t": "a", "m2": "m", "i": "i"}[block] for block in blocks)
    assert (report["num_shards"] > 1) == (num_files > 1)
    expected = published_logits(source, draw_tokens())
    assert expected.std() > 0.5
    torch.testing.assert_close(hybrid_logits(tmp_path / "out", draw_tokens()), expected, atol=1e-5, rtol=1e-5)


def test_import_adds_the_step_bias_twice_and_it_matters(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    import_apriel(source, tmp_path / "out")
    mixers = read_config(tmp_path / "out")["mixers"]
    assert [mixer["type"] for mixer in mixers] == ["attention", "mamba1", "identity", "mamba1", "attention"]
    assert mixers[1]["dt_bias_mode"] == "double"
    edit_config(
        tmp_path / "out",
        mixers=[mixer | {"dt_bias_mode": "single"} if "dt_bias_mode" in mixer else mixer for mixer in mixers],
    )
    difference = hybrid_logits(tmp_path / "out", draw_tokens()) - published_logits(source, draw_tokens())
    assert difference.abs().max() > 1e-2


def test_sizes_come_from_the_tensors_where_the_config_leaves_them_open(tmp_path):
    open_sizes = {"dt_rank": "auto", "d_xb": None, "d_inner": None}
    source = write_checkpoint(tmp_path / "source", ssm=open_sizes)
    import_apriel(source, tmp_path / "open")
    bare = write_checkpoint(tmp_path / "bare", changes={"ssm_cfg": "absent"})
    import_apriel(bare, tmp_path / "absent")
    for folder in ("open", "absent"):
        spec = layout_of(load_model(tmp_path / folder).config).layers[1]
        assert (spec.d_inner, spec.d_xb, spec.state_size, spec.dt_rank, spec.conv_kernel) == (D, X, N, RANK, TAPS)


def test_import_tells_which_fields_are_left_to_defaults(tmp_path):
    source = write_checkpoint(tmp_path / "source", changes={"sliding_window": "absent", "rope_theta": "absent"})
    report = import_apriel(source, tmp_path / "out")
    assert report["lacking"] == {"sliding_window": 4096, "rope_theta": 10000.0}
    assert import_apriel(write_checkpoint(tmp_path / "whole"), tmp_path / "out2")["lacking"] == {}


def test_older_model_type_and_tied_embeddings_are_read(tmp_path):
    source = write_checkpoint(
        tmp_path / "source",
        changes={
            "model_type": "apriel_ssm_thinker_hybrid",
            "tie_word_embeddings": True,
            "auto_map": {"AutoConfig": "x.Y"},
        },
    )
    edit_tensors(source, lm_head__weight=None)
    import_apriel(source, tmp_path / "out")
    assert "auto_map" not in read_config(tmp_path / "out")
    expected = published_logits(source, draw_tokens())
    torch.testing.assert_close(hybrid_logits(tmp_path / "out", draw_tokens()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "ssm", "message"),
    [
        ({"model_type": "mistral"}, {}, "model_type is 'mistral', but an Apriel-H1 checkpoint has 'apriel_hybrid_ssm'"),
        (
            {"hybrid_block_layout": ["t", "m2d", "i", "m2", "t"]},
            {},
            r"hybrid_block_layout\[1\] is 'm2d', which no mixer",
        ),
        ({"hybrid_block_layout": ["m2"]}, {}, "hybrid_block_layout has 1 entries and num_hidden_layers is 5"),
        ({"linear_attn_config": {}}, {}, "keys whose meaning is not known: linear_attn_config; remove"),
        ({"mlp_bias": True}, {}, "mlp_bias is True, but only False can be read"),
        ({"ssm_cfg": [1]}, {}, r"ssm_cfg is \[1\], but it maps names to values"),
        ({}, {"headdim": 4}, "ssm_cfg: it has keys whose meaning is not known: headdim"),
        ({}, {"repeat_kv_before_conv": False}, "ssm_cfg.repeat_kv_before_conv is False, but layer 1 can only"),
        ({}, {"d_state": 64}, "ssm_cfg.d_state is 64, but by its tensors layer 1 has 4"),
        ({}, {"dt_rank": 2}, "ssm_cfg.dt_rank is 2, but by its tensors layer 1 has 3"),
        (
            {"intermediate_size": 48},
            {},
            r"another shape than the config says: model.layers.0.mlp.down_proj.weight \[24, 40\]",
        ),
    ],
)
def test_config_that_cannot_be_read_is_an_error(tmp_path, changes, ssm, message):
    source = write_checkpoint(tmp_path / "source", changes=changes, ssm=ssm)
    with pytest.raises(ValueError, match=message):
        import_apriel(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__layers__1__mixer__z_bias": torch.ones(D)},
            "belong to no part of the model: model.layers.1.mixer.z_bias",
        ),
        ({"model__layers__2__mlp__up_proj__weight": torch.ones(FFN, E)}, "belong to no part .* model.layers.2.mlp.up"),
        ({"model__layers__0__mixer__D": torch.ones(D)}, "belong to no part of the model: model.layers.0.mixer.D"),
        ({"model__layers__3__mixer__D": None}, "tensors are missing: model.layers.3.mixer.D"),
        ({"model__layers__1__mixer__A_log": None}, "layer 1 is m2, but model.layers.1.mixer.A_log is missing"),
        (
            {"model__layers__1__mixer__in_proj__weight": torch.ones(97, E)},
            "layer 1: 97 rows of .* do not go with d_inner 32",
        ),
        ({"model__layers__1__mixer__D": torch.ones(D + 1)}, r"model.layers.1.mixer.D \[33\], not \[32\]"),
    ],
)
def test_tensor_that_does_not_fit_is_an_error(tmp_path, changes, message):
    source = write_checkpoint(tmp_path / "source")
    edit_tensors(source, **changes)
    with pytest.raises(ValueError, match=message):
        import_apriel(source, tmp_path / "out")


# --- there and back ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_keeps_every_bit_and_key(tmp_path, dtype):
    changes = {"torch_dtype": str(dtype).removeprefix("torch.")}
    source = write_checkpoint(tmp_path / "source", num_files=2, dtype=dtype, changes=changes)
    import_apriel(source, tmp_path / "ours")
    report = export_apriel(tmp_path / "ours", tmp_path / "back")
    assert report["num_halved"] == 0
    before, after = read_config(source), read_config(tmp_path / "back")
    assert after.keys() - before.keys() == {"transformers_version"}
    assert {key: after[key] for key in before} == before
    assert_same_bits(read_tensors(source), read_tensors(tmp_path / "back"))


def test_round_trip_by_way_of_a_loaded_model_keeps_them_too(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    import_apriel(source, tmp_path / "ours")
    save_hybrid(load_model(tmp_path / "ours"), None, tmp_path / "saved")
    export_apriel(tmp_path / "saved", tmp_path / "back")
    before, after = read_config(source), read_config(tmp_path / "back")
    assert {key: after[key] for key in before} == before
    assert_same_bits(read_tensors(source), read_tensors(tmp_path / "back"))


def assert_same_bits(before, after):
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name


def test_fused_step_size_comes_back_as_two_tensors(tmp_path):
    source = write_checkpoint(tmp_path / "source", ["m2"], fused=True)
    import_apriel(source, tmp_path / "ours")
    export_apriel(tmp_path / "ours", tmp_path / "back")
    before, after = read_tensors(source), read_tensors(tmp_path / "back")
    at = "model.layers.0.mixer"
    parts = [after.pop(f"{at}.in_proj.weight"), after.pop(f"{at}.dt_in_proj.weight")]
    assert torch.equal(torch.cat(parts), before.pop(f"{at}.in_proj.weight"))
    assert_same_bits(before, after)


# --- writing ---


@pytest.mark.parametrize("mode", ["single", "double"])
@pytest.mark.parametrize("tied", [False, True])
def test_exported_hybrid_computes_the_same_by_the_published_formula(tmp_path, make_teacher, mode, tied):
    mixer = Mamba1Spec(state_size=4, dt_bias_mode=mode)
    layers = [mixer, AttentionSpec(), mixer]
    rope = {"rope_type": "default", "rope_theta": 300.0}
    folder = save_made_hybrid(tmp_path / "ours", make_teacher, layers, tie_word_embeddings=tied, rope_parameters=rope)
    report = export_apriel(folder, tmp_path / "theirs")
    assert report["num_halved"] == (2 if mode == "single" else 0)
    config = read_config(tmp_path / "theirs")
    assert (config["rope_theta"], config["rope_scaling"], config["torch_dtype"]) == (300.0, None, "float32")
    assert config["ssm_cfg"]["d_inner"] % config["ssm_cfg"]["n_qk_heads"] == 0
    expected = hybrid_logits(folder, draw_tokens())
    torch.testing.assert_close(published_logits(tmp_path / "theirs", draw_tokens()), expected, atol=1e-5, rtol=1e-5)
    if mode == "double":
        import_apriel(tmp_path / "theirs", tmp_path / "again")
        assert_same_bits(read_tensors(folder), read_tensors(tmp_path / "again"))


def test_layers_converted_after_an_import_are_exported_by_their_own_sizes(tmp_path):
    import_apriel(write_checkpoint(tmp_path / "source", ["t", "t"], ssm={"d_state": 64}), tmp_path / "ours")
    layout = LayoutSpec(layers=(PLAIN, AttentionSpec()))
    save_hybrid(convert_model(load_model(tmp_path / "ours"), layout), None, tmp_path / "hybrid")
    export_apriel(tmp_path / "hybrid", tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    assert (config["hybrid_block_layout"], config["ssm_cfg"]["d_state"]) == (["m2", "t"], 4)
    expected = hybrid_logits(tmp_path / "hybrid", draw_tokens())
    torch.testing.assert_close(published_logits(tmp_path / "theirs", draw_tokens()), expected, atol=1e-5, rtol=1e-5)


def test_rope_scaling_survives_by_its_older_name(tmp_path, make_teacher):
    scaling = {"rope_type": "linear", "factor": 4.0}
    folder = save_made_hybrid(
        tmp_path / "ours", make_teacher, [AttentionSpec()], rope_parameters=scaling | {"rope_theta": 300.0}
    )
    export_apriel(folder, tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    assert config["rope_theta"] == 300.0
    assert config["rope_scaling"] == scaling
    assert "rope_parameters" not in config


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GatedDeltaNetSpec(), r"mixers\[2\]: the layer is a gated_delta_net, but Apriel-H1 has only attention, mamba1"),
        (SlidingWindowSpec(window=8), r"mixers\[2\]: the layer is a sliding_window"),
        (Mamba1Spec(state_size=4, gate_bias=True), r"mixers\[2\].gate_bias: it is True, for which .* no tensors"),
        (Mamba1Spec(state_size=4, qkv_bias=True), r"mixers\[2\].qkv_bias"),
        (Mamba1Spec(state_size=4, output_bias=True), r"mixers\[2\].output_bias"),
        (Mamba1Spec(state_size=4, qk_norm="head"), r"mixers\[2\].qk_norm: it is 'head'"),
        (Mamba1Spec(state_size=8), r"mixers\[2\].state_size: it is 8, but another layer has 4 and .* one d_state"),
        (Mamba1Spec(state_size=4, dt_rank=5), r"mixers\[2\].dt_rank: it is 5"),
    ],
)
def test_layer_that_the_format_cannot_hold_is_named(tmp_path, make_teacher, spec, message):
    folder = save_made_hybrid(tmp_path / "ours", make_teacher, [PLAIN, AttentionSpec(), PLAIN])
    mixers = read_config(folder)["mixers"]
    config = load_model(folder).config
    config.set_layout(LayoutSpec(layers=(PLAIN, AttentionSpec(), spec)).resolve(geometry_of(config)))
    edit_config(folder, mixers=[*mixers[:2], config.mixers[2]])
    with pytest.raises(ValueError, match=message):
        export_apriel(folder, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_identity_with_a_live_mlp_is_refused(tmp_path):
    import_apriel(write_checkpoint(tmp_path / "source", ["t", "i"]), tmp_path / "ours")
    edit_tensors(tmp_path / "ours", model__layers__1__mlp__down_proj__weight=torch.ones(E, FFN))
    with pytest.raises(ValueError, match=r"mixers\[1\]: the layer's attention is an identity but its MLP is not"):
        export_apriel(tmp_path / "ours", tmp_path / "theirs")


def test_hybrid_of_another_family_is_refused(tmp_path, make_teacher):
    folder = save_made_hybrid(tmp_path / "ours", make_teacher, [PLAIN], family="llama")
    with pytest.raises(ValueError, match="model_type is 'hybrid_llama', but Apriel-H1 is a 'hybrid_mistral'"):
        export_apriel(folder, tmp_path / "theirs")


def test_bias_that_cannot_be_halved_is_refused_not_rounded(tmp_path, make_teacher):
    folder = save_made_hybrid(tmp_path / "ours", make_teacher, [PLAIN])
    name = "model.layers.0.self_attn.mixer.dt_proj.bias"
    bias = read_tensors(folder)[name]
    bias[0] = torch.finfo(torch.float32).smallest_normal * 2**-23  # the smallest number above zero
    edit_tensors(folder, **{name.replace(".", "__"): bias})
    with pytest.raises(ValueError, match=r"dt_proj\.bias holds numbers too small for torch.float32"):
        export_apriel(folder, tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


# --- files ---


def test_companions_go_along_and_code_does_not(tmp_path):
    source = write_checkpoint(tmp_path / "source", ["t"])
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "modeling_x.py",
    ):
        (source / name).write_text(f"{name}\n")
    import_apriel(source, tmp_path / "ours")
    export_apriel(tmp_path / "ours", tmp_path / "back")
    for folder in ("ours", "back"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert names == {path.name for path in source.iterdir()} - {"modeling_x.py"}
        assert (tmp_path / folder / "tokenizer.json").read_text() == "tokenizer.json\n"


def test_target_that_exists_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "source", ["t"])
    import_apriel(source, tmp_path / "ours")
    before = read_config(tmp_path / "ours")
    with pytest.raises(ValueError, match="exists already"):
        import_apriel(source, tmp_path / "ours")
    with pytest.raises(ValueError, match="exists already"):
        export_apriel(tmp_path / "ours", source)
    assert read_config(tmp_path / "ours") == before


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "source")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(conversion, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        import_apriel(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_no_more_than_a_shard_is_read_at_a_time(tmp_path, monkeypatch):
    """Between two files written, no more bytes are read than a file may have."""
    source = write_checkpoint(tmp_path / "source", ["t", "m2", "t"])
    events = []
    read, save = stored.StoredTensors.copy, stored.save_file

    def spy_read(self, *arguments):
        events.append((tensor := read(self, *arguments)).nbytes)
        return tensor

    def spy_save(*arguments, **options):
        events.append("saved")
        return save(*arguments, **options)

    monkeypatch.setattr(stored.StoredTensors, "copy", spy_read)
    monkeypatch.setattr(stored, "save_file", spy_save)
    done = []
    report = import_apriel(
        source, tmp_path / "out", max_shard_bytes=20_000, on_progress=lambda *counts: done.append(counts)
    )
    total = 0
    for event in events:
        total = 0 if event == "saved" else total + event
        assert total <= 20_000
    assert events.count("saved") == report["num_shards"] > 2
    assert done[-1] == (report["num_tensors"],) * 2

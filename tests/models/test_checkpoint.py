"""Checkpoints: what is saved comes back bit for bit; what does not fit together is named, never invented."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridize.models import attention_module, check_output, load_model, load_teacher, save_hybrid


@pytest.fixture
def saved(hybrid, tmp_path):
    return save_hybrid(hybrid, None, tmp_path / "out")


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("loader", [load_model, AutoModelForCausalLM.from_pretrained])
def test_saved_hybrid_comes_back_bit_for_bit(hybrid, saved, draw_tokens, loader):
    loaded = loader(saved)
    assert type(loaded) is type(hybrid)
    before, after = hybrid.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    tokens = draw_tokens(2, 8)
    assert torch.equal(loaded(tokens).logits, hybrid(tokens).logits)
    assert loaded.config.layout == hybrid.config.layout


def test_bfloat16_roundtrip_keeps_every_bit_and_fp32_scan(hybrid, tmp_path):
    save_hybrid(hybrid, None, tmp_path / "fp32")
    half = load_model(tmp_path / "fp32", dtype=torch.bfloat16)
    save_hybrid(half, None, tmp_path / "bf16")
    again = load_model(tmp_path / "bf16")
    mixer = attention_module(again, 0).mixer
    for parameter in (mixer.A_log, mixer.D, mixer.dt_proj.bias):
        assert parameter.dtype == torch.float32
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert torch.equal(mixer.A_log, attention_module(hybrid, 0).mixer.A_log)
    for name, tensor in half.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert again.state_dict()[name].dtype == tensor.dtype, name


def test_sharded_checkpoint_loads(hybrid, tmp_path, draw_tokens):
    folder = save_hybrid(hybrid, None, tmp_path / "out", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(load_model(folder)(draw_tokens(1, 6)).logits, hybrid(draw_tokens(1, 6)).logits)


def test_loaded_teacher_is_frozen_and_a_hybrid_is_refused(teacher, saved, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    loaded = load_teacher(tmp_path / "teacher")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    with pytest.raises(ValueError, match="it holds a hybrid, but a teacher is asked for"):
        load_teacher(saved)


@pytest.mark.parametrize("name", ["A_log", "in_proj.weight", "dt_proj.bias"])
def test_missing_tensor_is_named_not_invented(saved, name):
    full = f"model.layers.2.self_attn.mixer.{name}"
    edit_tensors(saved, lambda tensors: tensors.pop(full))
    with pytest.raises(ValueError, match=r"tensors are missing: .*Fetch or convert") as caught:
        load_model(saved)
    assert f"missing: {full}." in str(caught.value)


def test_plain_loading_initialises_a_missing_tensor_by_the_mixers_rule(saved, hybrid):
    name = "model.layers.2.self_attn.mixer.A_log"
    edit_tensors(saved, lambda tensors: tensors.pop(name))
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(loaded.state_dict()[name], hybrid.state_dict()[name])
    for other, tensor in hybrid.state_dict().items():
        assert torch.equal(loaded.state_dict()[other], tensor), other


def test_superfluous_tensor_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.update({"model.layers.9.odd": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"belong to no part of the model: model\.layers\.9\.odd"):
        load_model(saved)


def test_tensor_of_another_shape_is_named(saved):
    name = "model.layers.2.self_attn.mixer.D"
    edit_tensors(saved, lambda tensors: tensors.update({name: torch.ones(5)}))
    with pytest.raises(ValueError, match=r"another shape .*layers\.2\.self_attn\.mixer\.D"):
        load_model(saved)


def test_checkpoint_without_mixers_in_its_config_is_an_error(saved):
    edit_config(saved, mixers=None)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.self_attn\.k_proj\.weight"):
        load_model(saved)


def test_faulty_mixer_in_config_is_named(saved):
    mixers = json.loads((saved / "config.json").read_text())["mixers"]
    mixers[2]["state_size"] = 5
    edit_config(saved, mixers=mixers)
    with pytest.raises(ValueError, match=r"config\.mixers\[2\].*not a multiple of state_size 5"):
        load_model(saved)


def test_missing_folder_and_config_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: it has no config\.json"):
        load_model(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json: it is not readable as JSON"),
        ("[]", r"config\.json: it names no model_type"),
        ('{"model_type": "bert"}', r"config\.json: model_type: the model family 'bert' is not in the table"),
    ],
)
def test_faulty_config_is_named(saved, text, message):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_truncated_weights_are_named(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: it is damaged, perhaps cut short .*again"):
        load_model(saved)


def test_missing_weights_and_shards_are_named(hybrid, saved, tmp_path):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"out: it has no \*\.safetensors"):
        load_model(saved)
    sharded = save_hybrid(hybrid, None, tmp_path / "sharded", max_shard_size="20KB")
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: the index lists it, but it is missing"):
        load_model(sharded)
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable index"):
        load_model(sharded)


def test_existing_output_is_never_overwritten(hybrid, saved):
    before = {file: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(ValueError, match="out: it exists already and nothing is ever overwritten; remove it"):
        save_hybrid(hybrid, None, saved)
    assert {file: file.read_bytes() for file in saved.iterdir()} == before


def test_empty_output_folder_is_filled(hybrid, tmp_path):
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out")
    save_hybrid(hybrid, None, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_interrupted_save_leaves_nothing(hybrid, tmp_path):
    class Interrupting:
        def save_pretrained(self, folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_hybrid(hybrid, Interrupting(), tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_trained_model_converts_saves_loads_and_tells_a_story(stories, make_hybrid, tmp_path):
    teacher, tokenizer = load_teacher(stories), AutoTokenizer.from_pretrained(stories)
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    same = make_hybrid(teacher, [])
    assert torch.equal(same(prompt).logits, teacher(prompt).logits)
    hybrid = make_hybrid(teacher, [2])
    save_hybrid(hybrid, tokenizer, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    text = words.decode(loaded.generate(prompt, **options)[0])
    assert text == tokenizer.decode(hybrid.generate(prompt, use_cache=False, **options)[0])
    assert words.get_vocab() == tokenizer.get_vocab()

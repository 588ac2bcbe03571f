"""Merged checkpoints: whole, loadable, in little memory; and what does not fit together is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridize.merging import METHODS, merge
from hybridize.models import load_model, load_teacher
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.transfer import convert

POCKET = Path(__file__).parents[2] / "models" / "pocket-teacher"
LAYERS = (6, 7, 10, 11)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def convert_to(folder, teacher, layers, mixer=None, dtype="auto"):
    hybrid, _ = convert(
        load_teacher(teacher, dtype=dtype), layout_of(teacher, layers, mixer or Mamba1Spec()), share=True
    )
    hybrid.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return folder


def layout_of(teacher, layers, mixer):
    num_layers = json.loads((Path(teacher) / "config.json").read_text())["num_hidden_layers"]
    return LayoutSpec.replace(num_layers, layers, mixer)


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def perturb(source, out, scale, *, names="", seed=0):
    """A copy of a checkpoint with noise, relative to each tensor's size, on the tensors whose names hold `names`."""
    shutil.copytree(source, out)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in sorted(tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().pow(2).mean().sqrt()
        if names in name:
            tensors[name] = (tensor.float() + scale * noise).to(tensor.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def snapshot(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tiny_teacher, tmp_path_factory):
    """A conversion of the tiny teacher and two that went on from it."""
    root = tmp_path_factory.mktemp("made")
    base = convert_to(root / "base", tiny_teacher, (1, 2))
    (base / "manifest.json").write_text("{}")
    return [base, perturb(base, root / "a", 0.1, seed=1), perturb(base, root / "b", 0.1, seed=2)]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_merged_with_itself_is_itself(made, tmp_path, method):
    base, one, _ = made
    options = {"base": base} if METHODS[method].needs_base else {}
    stats = merge([one, one], tmp_path / "out", method=method, weights=(0.3, 0.7), **options)
    before, after = tensors_of(one), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert stats["num_identical"] == stats["num_tensors"] == len(before)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_is_the_same_in_all_sources_keeps_its_bits(made, tmp_path, method):
    base, one, _ = made
    two = perturb(one, tmp_path / "two", 0.1, names="mlp")
    options = {"base": base} if METHODS[method].needs_base else {}
    stats = merge([one, two], tmp_path / "out", method=method, weights=(0.3, 0.7), **options)
    before, after = tensors_of(one), tensors_of(tmp_path / "out")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "mlp" not in name}
    assert stats["num_identical"] == len(same)


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_weights_one_and_zero_give_that_source(made, tmp_path, method):
    for position, weights in enumerate([(1, 0), (0, 5)]):
        out = tmp_path / str(position)
        assert merge(made[1:], out, method=method, weights=weights)["weights"] == [1 - position, position]
        expected, merged = tensors_of(made[1 + position]), tensors_of(out)
        assert all(torch.equal(expected[name], merged[name]) for name in expected)


def test_weights_need_not_sum_to_one_and_are_equal_by_default(made, tmp_path):
    merge(made, tmp_path / "a", weights=(2, 2, 2))
    merge(made, tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_ties_starts_from_the_base(made, tmp_path):
    base, one, two = made
    counted = merge([one, two], tmp_path / "out", method="ties", base=base, density=0.2)
    start, merged = tensors_of(base), tensors_of(tmp_path / "out")
    unchanged = sum(int((start[name] == merged[name]).sum()) for name in start)
    share = unchanged / counted["num_parameters"]
    assert 0.6 < share < 0.68  # (1 - 0.2)^2 of the entries are kept by neither
    assert counted["num_kept"] == pytest.approx(2 * 0.2 * counted["num_parameters"], rel=0.01)
    assert 0.4 < counted["num_conflicts"] / (0.2**2 * counted["num_parameters"]) < 0.6


def test_a_merged_pair_of_opposite_errors_is_the_trained_model(tmp_path):
    """On the shipped teacher's weights: the mean of a conversion with an error and one without it in reverse."""
    whole = convert_to(tmp_path / "whole", POCKET, LAYERS, dtype=torch.float32)
    plus = perturb(whole, tmp_path / "plus", 0.2)
    minus = perturb(whole, tmp_path / "minus", -0.2)
    merge([plus, minus], tmp_path / "out", max_shard_bytes=9_000_000)
    ids = torch.randint(0, 560, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        models = [load_model(folder) for folder in (whole, plus, tmp_path / "out")]
        expected, wrong, merged = (model(ids).logits for model in models)
    assert models[0].config.layout == models[2].config.layout
    assert (wrong - expected).abs().mean() > 1
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)


def test_slerp_and_ties_of_converted_trained_weights_load_and_keep_each_dtype(tmp_path):
    base = convert_to(tmp_path / "base", POCKET, LAYERS)
    one, two = perturb(base, tmp_path / "one", 0.02, seed=1), perturb(base, tmp_path / "two", 0.02, seed=2)
    first = tensors_of(one)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16, torch.float32}
    merge([one, two], tmp_path / "slerp", method="slerp")
    merge([one, two], tmp_path / "ties", method="ties", base=base)
    for folder in (tmp_path / "slerp", tmp_path / "ties"):
        load_model(folder)
        merged = tensors_of(folder)
        assert {name: tensor.dtype for name, tensor in merged.items()} == {n: t.dtype for n, t in first.items()}


def test_merged_hybrid_loads_with_the_auto_classes(made, tmp_path):
    merge(made[1:], tmp_path / "out", max_shard_bytes=30_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "HybridMistralForCausalLM"
    parts = [tensors_of(folder) for folder in made[1:]]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2)
    tokenizer, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", made[0]))
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer("Lena has 3 red marbles.").input_ids == original("Lena has 3 red marbles.").input_ids


def test_shards_are_no_larger_than_asked_for_and_indexed(made, tmp_path):
    limit = 30_000
    done = []
    stats = merge(
        made[1:], tmp_path / "out", max_shard_bytes=limit, on_progress=lambda *progress: done.append(progress)
    )
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == stats["num_shards"] > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(made[1]))
    total = 0
    for number, file in enumerate(files, start=1):
        assert file.name == f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
        total += size
    assert index["metadata"]["total_size"] == stats["num_bytes"] == total
    assert done == [(i + 1, stats["num_tensors"]) for i in range(stats["num_tensors"])]


def test_a_small_model_is_one_file_and_carries_what_a_checkpoint_carries(made, tmp_path):
    merge(made, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    expected = {file.name for file in made[0].iterdir()} - {"manifest.json"}
    assert names == expected
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (made[0] / name).read_bytes()


def test_sources_may_be_cut_into_shards_differently(made, tmp_path):
    merge([made[1], made[1]], tmp_path / "sharded", max_shard_bytes=25_000)
    merge([tmp_path / "sharded", made[2]], tmp_path / "a")
    merge([made[1], made[2]], tmp_path / "b")
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_teachers_can_be_merged_and_so_can_a_hybrid_without_mixers(tiny_teacher, tmp_path):
    other = perturb(tiny_teacher, tmp_path / "other", 0.1)
    same = convert_to(tmp_path / "same", tiny_teacher, ())
    merge([tiny_teacher, other], tmp_path / "out")
    assert load_teacher(tmp_path / "out").config.num_hidden_layers == 4
    merge([same, other], tmp_path / "mixed")
    assert load_model(tmp_path / "mixed").config.model_type == "hybrid_mistral"


def test_another_layout_names_the_layer_and_both_mixers(made, tiny_teacher, tmp_path):
    other = convert_to(tmp_path / "other", tiny_teacher, (1, 3))
    message = r"other: layer 2 is attention, but mamba1 in .*base; merge models of one layout only"
    with pytest.raises(ValueError, match=message):
        merge([made[0], other], tmp_path / "out")
    with pytest.raises(ValueError, match=r"layer 1 is attention, but mamba1 in"):
        merge([made[0], tiny_teacher], tmp_path / "out")
    wide = convert_to(tmp_path / "wide", tiny_teacher, (1, 2), Mamba1Spec(state_size=4))
    with pytest.raises(ValueError, match=r"layer 1 is mamba1 with state_size=4, but mamba1 with state_size=16 in"):
        merge([made[0], wide], tmp_path / "out")
    with pytest.raises(ValueError, match=r"layer 2 is attention, but mamba1 in"):  # the base is looked at as well
        merge(made[1:], tmp_path / "out", method="ties", base=other)
    assert {file.name for file in tmp_path.iterdir()} == {"other", "wide"}  # nothing begun, nothing left


def test_another_config_names_the_field_and_both_values(made, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(made[1], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "eos_token_id": 7}))
    with pytest.raises(ValueError, match=r"config\.json: rms_norm_eps is 0\.5, but 1e-06 in .*; merge models of one"):
        merge([made[0], other], tmp_path / "out")
    (other / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))  # no fact about the weights
    merge([made[0], other], tmp_path / "out")


def test_a_tensor_of_another_shape_or_name_is_named(made, tmp_path):
    name = "model.layers.2.self_attn.mixer.D"
    other = tmp_path / "other"
    shutil.copytree(made[1], other)
    edit(other, lambda tensors: tensors.update({name: torch.ones(5)}))
    with pytest.raises(ValueError, match=rf"other: tensor {name} has the shape \[5\], but \[32\] in .*base"):
        merge([made[0], other], tmp_path / "out")
    edit(other, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"other: it has no tensor {name}, but .*base has"):
        merge([made[0], other], tmp_path / "out")
    with pytest.raises(ValueError, match=rf"other: it has no tensor {name}, but .*base has"):
        merge([other, made[0]], tmp_path / "out")


def test_a_tensor_that_is_not_finite_is_named(made, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(made[1], other)
    edit(other, lambda tensors: tensors["model.norm.weight"].__setitem__(3, float("nan")))
    with pytest.raises(ValueError, match=r"other: tensor model\.norm\.weight: it holds NaN or infinity; train that"):
        merge([made[0], other], tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["other"]


def test_a_truncated_or_missing_shard_is_named(made, tmp_path):
    merge([made[1], made[1]], tmp_path / "sharded", max_shard_bytes=25_000)
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(
        ValueError, match=rf"{shard.name}: it is damaged, perhaps cut short .*write the checkpoint again"
    ):
        merge([made[0], tmp_path / "sharded"], tmp_path / "out")
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: the index lists it, but it is missing; fetch or write"):
        merge([made[0], tmp_path / "sharded"], tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        merge([made[0], tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(made, tmp_path):
    before = snapshot(made[1])
    with pytest.raises(ValueError, match="it exists already and nothing is ever overwritten"):
        merge(made, made[1])
    assert snapshot(made[1]) == before

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(made, tmp_path / "deep" / "out", on_progress=fail)
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_folder_of_the_callers_is_filled_as_it_is(made, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="out: there is no such folder to write into; make it first"):
        merge(made, out, into=True)
    out.mkdir()
    (out / "stage.key").write_text("key")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"half of it")  # a killed call's
    merge(made, out, into=True)
    assert (out / "stage.key").read_text() == "key"
    load_model(out)
    before = snapshot(made[0])
    with pytest.raises(ValueError, match="it is one of the models to merge; give another folder"):
        merge(made, made[0], into=True)
    assert snapshot(made[0]) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "slurp"}, r"method: 'slurp' is unknown; use one of linear, slerp, ties; did you mean 'slerp'\?"),
        ({"method": "slerp"}, "sources: 3 given, but slerp merges 2"),
        ({"weights": (1, 2)}, "weights: 2 for 3 sources; give one for each"),
        ({"weights": (1, -1, 1)}, "none may be negative"),
        ({"weights": (0, 0, 0)}, "one must be above 0"),
        ({"weights": (1, float("nan"), 1)}, "none may be negative"),
        ({"method": "ties"}, "base: ties takes one; give the common starting point"),
        ({"base": "x"}, "base: linear takes none; leave it out"),
        ({"density": 0}, "density: 0 is out of range"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: 0 is out of range"),
    ],
)
def test_options_out_of_range_are_named(made, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        merge(made, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="sources: 1 given, but linear merges two or more"):
        merge(made[:1], tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc to read the peak of memory")
def test_memory_stays_near_one_shard(made, tmp_path):
    """Three models of 64 MB each, merged in shards of 8 MB by every method, in a process of its own."""
    for seed, name in enumerate("abc"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(made[0] / "config.json", folder / "config.json")
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"t{i:02}": torch.rand(1 << 18, generator=generator) for i in range(64)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code = f"""
import torch
from pathlib import Path
from hybridize.merging import merge

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

torch.set_num_threads(1)
a, b, base, small = {[str(tmp_path / name) for name in "abc"] + [str(made[0])]!r}
merge([small, small], {str(tmp_path / "warm")!r})
before = peak()
for method in ("linear", "slerp", "ties"):
    merge([a, b], {str(tmp_path)!r} + "/" + method, method=method, base=base if method == "ties" else None,
          max_shard_bytes=8 << 20)
    print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rises_mb = [float(line) for line in done.stdout.split()]
    assert len(rises_mb) == 3
    assert max(rises_mb) < 5 * 8, rises_mb  # all of one model would be 64, of both 128

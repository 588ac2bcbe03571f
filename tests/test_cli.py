"""The command: every verb works, --help is quick, and mistakes end in one clear message."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hybridize import cli


def hybridize(capsys, *words: object) -> tuple[int, str, str]:
    """Run the command in this process; (exit code, standard output, standard error)."""
    old, sys.argv = sys.argv, ["hybridize", *map(str, words)]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = old
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.timing
def test_help_answers_within_half_a_second():
    command = [sys.executable, "-c", "from hybridize.cli import main; main()", "--help"]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - started)
        assert "distill" in done.stdout
    assert min(times) < 0.5


def test_verbs_lead_from_teacher_to_distilled_hybrid(capsys, tiny_teacher, tmp_path):
    ranking, hybrid, out = tmp_path / "ranking.json", tmp_path / "hybrid", tmp_path / "distilled"
    small = ["--tokens-per-step", 256, "--sequence-length", 256]
    assert hybridize(capsys, "rank", tiny_teacher, "--out", ranking, "--steps", 1, *small)[0] == 0
    code, text, _ = hybridize(capsys, "convert", tiny_teacher, hybrid, "--ranking", ranking, "--num", 2, "--explain")
    assert code == 0
    assert "o_proj" in text
    assert "A_log" in text
    assert hybridize(capsys, "distill", hybrid, tiny_teacher, out, "--steps", 2, *small)[0] == 0
    code, text, _ = hybridize(capsys, "evaluate", out, "--level", 1, "--problems", 1)
    assert code == 0
    assert "overall" in text


def test_verbs_of_the_whole_recipe_follow_one_another(capsys, tiny_teacher, tmp_path):
    small = ["--tokens-per-step", 256, "--sequence-length", 256, "--steps", 1]
    traces, hybrid, fitted = tmp_path / "traces", tmp_path / "hybrid", tmp_path / "fitted"
    tuned, merged, own = tmp_path / "tuned", tmp_path / "merged", tmp_path / "own"
    words = ["--num-prompts", 4, "--max-new-tokens", 8, "--verifier", "none", "--data", "world:1"]
    code, text, _ = hybridize(capsys, "traces", tiny_teacher, traces, *words)
    assert code == 0
    assert "4 of 4 answers kept" in text
    data = ["--data", traces / "traces.parquet"]
    assert hybridize(capsys, "convert", tiny_teacher, hybrid, "--layers", "1")[0] == 0
    assert hybridize(capsys, "fit", hybrid, tiny_teacher, fitted, *small, *data)[0] == 0
    code, text, _ = hybridize(capsys, "sft", fitted, tuned, *small, *data, "--teacher-control", tiny_teacher)
    assert code == 0
    assert (tmp_path / "tuned-teacher" / "model.safetensors").is_file()
    words = ["--on-policy", "--steps", 1, "--set", "prompts_per_step=2", "--set", "max_new_tokens=8"]
    assert hybridize(capsys, "distill", fitted, tiny_teacher, own, *words, "--data", "world:1")[0] == 0
    assert hybridize(capsys, "merge", tuned, own, "--out", merged, "--method", "slerp", "--weights", "0.7,0.3")[0] == 0
    further = tmp_path / "further"
    assert hybridize(capsys, "convert", merged, further, "--layers", "2")[0] == 0
    mixers = json.loads((further / "config.json").read_text())["mixers"]
    assert [mixer["type"] for mixer in mixers] == ["attention", "mamba1", "mamba1", "attention"]
    text_file, figures = tmp_path / "text.txt", tmp_path / "text.json"
    text_file.write_text("red box 914, gold jar 628. " * 20)
    words = ["--text", text_file, "--teacher", tiny_teacher, "--out", figures]
    assert hybridize(capsys, "evaluate", merged, *words)[0] == 0
    assert json.loads(figures.read_text())["kl_nats"] > 0
    code, text, _ = hybridize(capsys, "throughput", merged, "--batch-size", 2, "--new-tokens", 4, "--repeats", 1)
    assert code == 0
    assert "tokens/s" in text


def test_rank_takes_published_scores_and_a_hybrid(capsys, tiny_teacher, tmp_path):
    scores, out = tmp_path / "scores.csv", tmp_path / "ranking.json"
    scores.write_text("layer,mmlu\n-1,0.8\n0,0.3\n1,0.79\n2,0.5\n3,0.7\n")
    assert hybridize(capsys, "rank", tiny_teacher, "--out", out, "--import", scores)[0] == 0
    assert json.loads(out.read_text())["order"] == [1, 3, 2, 0]
    assert hybridize(capsys, "convert", tiny_teacher, tmp_path / "hybrid", "--layers", "1")[0] == 0
    words = ["--model", tmp_path / "hybrid", "--method", "loo", *SMALL, "--set", "heldout_rows=1"]
    assert hybridize(capsys, "rank", tiny_teacher, "--out", tmp_path / "loo.json", *words)[0] == 0
    assert sorted(json.loads((tmp_path / "loo.json").read_text())["order"]) == [0, 2, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "weight_decy=0.1"], "weight_decy: unknown key; did you mean 'weight_decay'?"),
        (["--set", "weight_decay"], "--set: 'weight_decay' is no setting; write e.g. --set weight_decay=0.1"),
        (["--data", "world:x"], "--data: 'world:x' names no levels; write e.g. world:1,2"),
    ],
)
def test_mistakes_in_options_of_many_verbs_are_named(capsys, hybrid, tiny_teacher, tmp_path, words, message):
    code, _, error = hybridize(capsys, "distill", hybrid, tiny_teacher, tmp_path / "out", "--steps", 1, *SMALL, *words)
    assert code == 2
    assert message in error


def test_a_layer_that_is_a_mixer_already_is_named(capsys, hybrid, tmp_path):
    code, _, error = hybridize(capsys, "convert", hybrid, tmp_path / "out", "--layers", "0,1")
    assert code == 2
    assert "--layers[1]: layer 1 is mamba1 already; name one that is attention still" in error


def test_convert_without_layers_is_the_teacher_bit_for_bit(capsys, tiny_teacher, tmp_path):
    import torch

    from hybridize.models import load_model

    assert hybridize(capsys, "convert", tiny_teacher, tmp_path / "same", "--layers", "none")[0] == 0
    ids = torch.arange(40).reshape(2, 20)
    one, two = load_model(tiny_teacher), load_model(tmp_path / "same")
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


def test_a_layout_of_letters_is_converted_and_explained(capsys, tiny_teacher, tmp_path):
    code, text, _ = hybridize(capsys, "convert", tiny_teacher, tmp_path / "mixed", "--layout", "misa", "--explain")
    assert code == 0
    assert "layout misa" in text
    assert "layer 0: becomes mamba1" in text
    assert "layer 1: becomes identity" in text
    assert "layer 2: becomes sliding_window" in text
    assert "layer 3: stays attention" in text


def test_a_hybrid_goes_to_the_released_format_and_comes_back(capsys, hybrid, tmp_path):
    from safetensors.torch import load_file

    code, text, _ = hybridize(capsys, "export", hybrid, tmp_path / "theirs", "--to", "apriel-h1")
    assert code == 0
    assert "halved" in text
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "apriel_hybrid_ssm"
    assert hybridize(capsys, "import", tmp_path / "theirs", tmp_path / "ours")[0] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (hybrid, tmp_path / "ours"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        factor = 2 if name.endswith("dt_proj.bias") else 1  # it comes back to be added twice
        assert (factor * after[name]).equal(tensor), name


def test_a_hybrid_goes_to_what_vllm_ships_or_hears_which_layer_is_in_the_way(capsys, tiny_teacher, hybrid, tmp_path):
    assert hybridize(capsys, "convert", tiny_teacher, tmp_path / "ours", "--layout", "a2a2")[0] == 0
    code, text, _ = hybridize(capsys, "export", tmp_path / "ours", tmp_path / "theirs")
    assert code == 0
    assert "it is a GraniteMoeHybridForCausalLM, with" in text
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "granitemoehybrid"
    assert (tmp_path / "theirs" / "tokenizer.json").is_file()
    code, _, error = hybridize(capsys, "export", hybrid, tmp_path / "none")
    assert code == 2
    assert "the layer is a mamba1, but it can only be attention or mamba2" in error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_checkpoint_of_the_wrong_format_is_named(capsys, tiny_teacher, tmp_path, verb):
    code, _, error = hybridize(capsys, verb, tiny_teacher, tmp_path / "out")
    assert code == 2
    assert "model_type" in error
    assert not (tmp_path / "out").exists()
    option = "--from" if verb == "import" else "--to"
    code, _, error = hybridize(capsys, verb, tiny_teacher, tmp_path / "out", option, "jamba")
    assert code == 2
    assert f"{option}: 'jamba' is unknown; use one of" in error
    assert "apriel-h1" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "3,9"], "--layers[1]: the teacher has no layer 9; it has 4, use 0..3"),
        (["--layers", "1", "--mixer", "mamba"], "did you mean 'mamba2'?"),
        (["--layout", "amx"], "--layout[2]: 'x' stands for nothing; use a (attention), m (mamba1)"),
        (["--layout", "am"], "it has 2 layers, but the model has 4"),
        (["--layout", "amaa", "--layers", "1"], "--layout: it says what every layer becomes"),
        (["--layers", "x"], "--layers: 'x' is no list of numbers"),
        (["--layers", "1", "--init", "alined"], "did you mean 'aligned'?"),
        ([], "say which layers"),
        (["--layers", "1", "--num", "2"], "--num: goes with --ranking only"),
        (
            ["--layers", "1", "--mixer", "{type: mamba1, state_sise: 8}"],
            "--mixer.state_sise: unknown key; did you mean",
        ),
        (["--layers", "1", "--mixer", "attention"], "--mixer: 'attention' is unknown; use one of mamba1"),
    ],
)
def test_convert_mistakes_are_named(capsys, tiny_teacher, tmp_path, words, message):
    code, _, error = hybridize(capsys, "convert", tiny_teacher, tmp_path / "out", *words)
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def test_convert_leaves_an_existing_folder_alone(capsys, tiny_teacher, tmp_path):
    (tmp_path / "note.txt").write_text("precious")
    code, _, error = hybridize(capsys, "convert", tiny_teacher, tmp_path, "--layers", "1")
    assert code == 2
    assert "exists already" in error
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_missing_and_truncated_checkpoints_are_named(capsys, tiny_teacher, tmp_path):
    code, _, error = hybridize(capsys, "convert", tmp_path / "nothing", tmp_path / "out", "--layers", "1")
    assert code == 2
    assert "there is no such folder" in error
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(tiny_teacher).iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    code, _, error = hybridize(capsys, "convert", broken, tmp_path / "out", "--layers", "1")
    assert code == 2
    assert "model.safetensors" in error


def test_recipe_mistakes_are_named(capsys, tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("name: bad\nteacher: ./t\nstages:\n- {kind: rank, stepz: 3}\n")
    code, _, error = hybridize(capsys, "run", recipe)
    assert code == 2
    assert "recipe.stages[0].stepz: unknown key; did you mean 'steps'?" in error


SMALL = ["--tokens-per-step", 256, "--sequence-length", 256]


@pytest.fixture
def hybrid(capsys, tiny_teacher, tmp_path) -> Path:
    assert hybridize(capsys, "convert", tiny_teacher, tmp_path / "hybrid", "--layers", "1")[0] == 0
    return tmp_path / "hybrid"


@pytest.fixture
def mute_teacher(tiny_teacher, tmp_path) -> Path:
    """A teacher whose tokenizer has no chat template."""
    shutil.copytree(tiny_teacher, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    return tmp_path / "mute"


def test_convert_takes_sizes_of_the_mixer(capsys, tiny_teacher, tmp_path):
    words = ["--layers", "1", "--mixer", "{type: mamba1, state_size: 8}"]
    assert hybridize(capsys, "convert", tiny_teacher, tmp_path / "out", *words)[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mixers"][1]["state_size"] == 8


def test_convert_refuses_another_models_ranking(capsys, tiny_teacher, tmp_path):
    orders = {"layers": [0, 1], "order": [1, 0]}
    ranking = {"format": "hybridize.ranking/1", "num_layers": 2, "mixer": {"type": "mamba1"}, "unit": "", **orders}
    ranking |= {"method": "random", "scores": None, "before": None, "settings": {}, "cost": {}}
    ranking["controls"] = {name: {"method": name, **orders} for name in ("uniform", "random")}
    (tmp_path / "ranking.json").write_text(json.dumps(ranking))
    words = ["--ranking", tmp_path / "ranking.json", "--num", 1]
    code, _, error = hybridize(capsys, "convert", tiny_teacher, tmp_path / "out", *words)
    assert code == 2
    assert "ranks a model of 2 layers" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_families_not_in_the_table_are_named(capsys, tiny_teacher, tmp_path, model_type):
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    config = json.loads((other / "config.json").read_text()) | {"model_type": model_type}
    (other / "config.json").write_text(json.dumps(config))
    for words in (
        ["convert", other, tmp_path / "out", "--layers", "1"],
        ["rank", other, "--out", tmp_path / "out", "--steps", 1, *SMALL],
        ["evaluate", other, "--problems", 1],
    ):
        code, _, error = hybridize(capsys, *words)
        assert code == 2
        assert f"the model family {model_type!r} is not in the table; use a model of one of llama, mistral" in error
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_missing_chat_template_is_named(capsys, mute_teacher, hybrid, tmp_path):
    for words in (
        ["rank", mute_teacher, "--out", tmp_path / "out", "--steps", 1, *SMALL],
        ["distill", hybrid, mute_teacher, tmp_path / "out", "--steps", 1, *SMALL],
        ["evaluate", mute_teacher, "--problems", 1],
    ):
        code, _, error = hybridize(capsys, *words)
        assert code == 2
        assert "has no chat template; set tokenizer.chat_template" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hybrid", "mute"]


def test_evaluate_names_a_folder_that_is_not_there(capsys, tmp_path):
    code, _, error = hybridize(capsys, "evaluate", tmp_path / "nothing")
    assert code == 2
    assert "there is no such folder; check the path" in error


def test_evaluate_overwrites_no_file_and_says_so_first(capsys, tiny_teacher, tmp_path):
    (tmp_path / "scores.json").write_text("precious")
    code, out, error = hybridize(capsys, "evaluate", tiny_teacher, "--problems", 1, "--out", tmp_path / "scores.json")
    assert code == 2
    assert "exists already" in error
    assert not out
    assert (tmp_path / "scores.json").read_text() == "precious"


def test_distill_names_a_malformed_row_and_makes_nothing(capsys, hybrid, tiny_teacher, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1 + 1?"}\n')
    words = ["--steps", 1, *SMALL, "--data", tmp_path / "bad.jsonl"]
    code, _, error = hybridize(capsys, "distill", hybrid, tiny_teacher, tmp_path / "out", *words)
    assert code == 2
    assert "bad.jsonl:1: completion missing" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "hybrid"]


def test_distill_of_another_student_does_not_stand(capsys, hybrid, tiny_teacher, tmp_path):
    words = ["distill", hybrid, tiny_teacher, tmp_path / "out", "--steps", 1, *SMALL]
    assert hybridize(capsys, *words)[0] == 0
    assert "stands, skipped" in hybridize(capsys, *words)[2]
    shutil.rmtree(hybrid)
    assert hybridize(capsys, "convert", tiny_teacher, hybrid, "--layers", "1", "--init", "random")[0] == 0
    code, _, error = hybridize(capsys, *words)  # files of the very same names and sizes
    assert code == 2
    assert "exists already" in error


def test_a_loss_that_turns_nan_stops_and_keeps_the_checkpoint(capsys, hybrid, tiny_teacher, tmp_path, monkeypatch):
    from hybridize.training import trainer

    real = trainer.batch_divergence
    calls = []

    def poisoned(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(trainer, "batch_divergence", poisoned)
    words = ["distill", hybrid, tiny_teacher, tmp_path / "out", "--steps", 6, *SMALL, "--save-every", 2]
    code, _, error = hybridize(capsys, *words)
    checkpoint = tmp_path / ".out.partial" / "checkpoints" / "checkpoint-2"
    assert code == 1
    assert "step 4 of 6: the loss is nan" in error
    assert f"the last good checkpoint is {checkpoint}" in error
    assert not (tmp_path / "out").exists()
    code, _, error = hybridize(capsys, *words, "--learning-rate", 1e-6)
    assert code == 2
    assert "it holds the unfinished work" in error
    assert (checkpoint / "complete.json").is_file()


def test_rank_names_the_layer_whose_loss_turns_nan(capsys, tiny_teacher, tmp_path):
    words = ["--steps", 6, *SMALL, "--learning-rate", 1e30]
    code, _, error = hybridize(capsys, "rank", tiny_teacher, "--out", tmp_path / "ranking.json", *words)
    assert code == 1
    assert "layer 0: the loss is nan at step 2; lower learning_rate (now 1e+30)" in error
    assert not (tmp_path / "ranking.json").exists()


@pytest.mark.parametrize(
    "full", [SafetensorError("Error while serializing: I/O error: No space left"), OSError(28, "No space left")]
)
def test_a_full_disk_is_named_and_leaves_nothing_half_written(capsys, tiny_teacher, tmp_path, monkeypatch, full):
    from transformers import PreTrainedModel

    def fail(*_, **__):
        raise full

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    code, _, error = hybridize(capsys, "convert", tiny_teacher, tmp_path / "out", "--layers", "1")
    assert code == 1
    assert f"{tmp_path / 'out'}: No space left; make room" in error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(capsys, tiny_teacher, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for words in (
        ["convert", tiny_teacher, tmp_path / "file" / "out", "--layers", "1"],
        ["rank", tiny_teacher, "--out", tmp_path / "file" / "out", "--steps", 1, *SMALL],
    ):
        code, _, error = hybridize(capsys, *words)
        assert code == 2
        assert f"{tmp_path / 'file'}" in error
        assert "check the path" in error


def test_ctrl_c_says_how_to_go_on(capsys, tiny_teacher, tmp_path, monkeypatch):
    from hybridize.models import checkpoint

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_hybrid", interrupt)
    code, _, error = hybridize(capsys, "convert", tiny_teacher, tmp_path / "out", "--layers", "1")
    assert code == 130
    assert "interrupted; the same command goes on" in error
    assert "Traceback" not in error


def test_plan_names_a_layer_out_of_range(capsys, tiny_teacher, tmp_path):
    (tmp_path / "r.yaml").write_text(f"name: r\nteacher: {tiny_teacher}\nstages:\n- {{kind: convert, layers: [9]}}\n")
    code, _, error = hybridize(capsys, "plan", tmp_path / "r.yaml")
    assert code == 2
    assert "recipe.stages[0].layers[0]: the teacher has no layer 9; it has 4, use 0..3" in error


def test_bench_measures_small_shapes_on_a_cpu(capsys, tmp_path):
    words = ("bench", "kernels", "--small", "--repeats", "1", "--op", "causal_conv", "--op", "distillation_loss")
    files = ("--out", tmp_path / "kernels.json", "--plot", tmp_path / "length.png")
    code, text, _ = hybridize(capsys, *words, *files)
    assert code == 0
    assert "causal_conv" in text
    assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")
    records = json.loads((tmp_path / "kernels.json").read_text())
    measured = [record for record in records if "length" not in record]
    assert {record["op"] for record in measured} == {"causal_conv", "distillation_loss"}
    assert all(record["forward_ms"] > 0 for record in measured if "skipped" not in record)
    lengths = {record["length"]: record for record in records if "length" in record}
    assert list(lengths) == [1024, 4096, 16384]
    assert all(0 < r["forward_ns_per_token"] < r["forward_backward_ns_per_token"] for r in lengths.values())
    code, _, error = hybridize(capsys, "bench", "kernels", "--op", "conv")
    assert code == 2
    assert "--op: 'conv' is unknown; use one of selective_scan" in error

"""The command: every verb works, --help is quick, and mistakes end in one clear message."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_convert_without_layers_is_the_teacher_bit_for_bit(capsys, tiny_teacher, tmp_path):
    import torch

    from hybridize.models import load_model

    assert hybridize(capsys, "convert", tiny_teacher, tmp_path / "same", "--layers", "none")[0] == 0
    ids = torch.arange(40).reshape(2, 20)
    one, two = load_model(tiny_teacher), load_model(tmp_path / "same")
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "3,9"], "--layers[1]: the teacher has no layer 9; it has 4, use 0..3"),
        (["--layers", "1", "--mixer", "mamba"], "did you mean 'mamba1'?"),
        (["--layers", "x"], "--layers: 'x' is no list of numbers"),
        (["--layers", "1", "--init", "alined"], "did you mean 'aligned'?"),
        ([], "say which layers"),
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

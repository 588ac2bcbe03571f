"""The verb search: from ranking files to a layout that convert takes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybridize.cli import app

RUNNER = CliRunner()


def test_search_chooses_a_layout_and_writes_what_it_found(tiny_teacher, tmp_path):
    files = []
    for mixer in ("mamba1", "mamba2"):
        files.append(str(tmp_path / f"{mixer}.json"))
        settings = ["--tokens-per-step", "256", "--sequence-length", "256", "--set", "heldout_rows=1"]
        command = ["rank", str(tiny_teacher), "--method", "perplexity", "--mixer", mixer, "--init", "neutral"]
        done = RUNNER.invoke(app, [*command, "--data", "world:1", *settings, "--out", files[-1]])
        assert done.exit_code == 0, done.output
    out, picture = tmp_path / "search.json", tmp_path / "search.png"
    options = ["--num", "2", "--context-tokens", "512", "--out", str(out), "--picture", str(picture)]
    done = RUNNER.invoke(app, ["search", str(tiny_teacher), *files, *options])
    assert done.exit_code == 0, done.output
    layout = json.loads(out.read_text())["chosen"]["layout"]
    assert f"layout: {layout} (" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    hybrid = tmp_path / "hybrid"
    done = RUNNER.invoke(app, ["convert", str(tiny_teacher), str(hybrid), "--layout", layout, "--init", "neutral"])
    assert done.exit_code == 0, done.output
    # Nothing is written over.
    with pytest.raises(ValueError, match="exists already"):
        RUNNER.invoke(app, ["search", str(tiny_teacher), *files, *options], catch_exceptions=False)


def test_convert_takes_a_searched_layout_with_its_sizes(tiny_teacher, tmp_path):
    files = []
    for name, mixer in (("small", "{type: mamba1, state_size: 8}"), ("two", "mamba2")):
        files.append(str(tmp_path / f"{name}.json"))
        settings = ["--tokens-per-step", "256", "--sequence-length", "256", "--set", "heldout_rows=1"]
        command = ["rank", str(tiny_teacher), "--method", "perplexity", "--mixer", mixer, "--init", "neutral"]
        done = RUNNER.invoke(app, [*command, "--data", "world:1", *settings, "--out", files[-1]])
        assert done.exit_code == 0, done.output
    out, hybrid = tmp_path / "search.json", tmp_path / "hybrid"
    done = RUNNER.invoke(app, ["search", str(tiny_teacher), files[0], "--num", "2", "--out", str(out)])
    assert "mamba1 (state_size=8)" in done.output
    assert "--init neutral" in done.output
    done = RUNNER.invoke(app, ["convert", str(tiny_teacher), str(hybrid), "--search", str(out), "--init", "neutral"])
    assert done.exit_code == 0, done.output
    mixers = json.loads((hybrid / "config.json").read_text())["mixers"]
    assert {mixer["state_size"] for mixer in mixers if mixer["type"] == "mamba1"} == {8}
    prints = [json.loads(Path(file).read_text())["settings"]["data_print"] for file in files]
    assert prints[0] == prints[1]
    changed = json.loads(Path(files[1]).read_text())
    changed["settings"]["data_print"] = "other"
    Path(files[1]).write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="was made from another data than"):
        RUNNER.invoke(app, ["search", str(tiny_teacher), *files, "--num", "2"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["search", "T", "R", "--scenario", "9"], "--scenario: without --gpu"),
        (["search", "T", "R", "--gpu", "h100", "--context-tokens", "99"], "--context-tokens: with --gpu"),
        (["search", "T", "R", "--picture", "p.jpg"], "--picture: p.jpg does not end in .png"),
        (["search", "T", "R", "--out", "p.png", "--picture", "p.png"], "--picture: p.png is --out as well"),
        (["plan", "--serve", "--gpu", "h200", "--config", "c.json"], "--config: it is not for plan --serve"),
        (["plan", "--serve", "--gpu", "h200", "--tflops", "0"], "--tflops: it is not for plan --serve"),
        (["plan", "recipes/demo.yaml", "--price-per-hour", "0"], "--price-per-hour: it is for plan --serve"),
        (["plan", "recipes/demo.yaml", "--tflops", "0"], "--tflops: 0 is out of range"),
        (["plan", "--serve", "--gpu", "h200", "--price-per-hour", "-3"], "--price-per-hour"),
        (["plan", "--serve", "--memory-gib", "nan", "--bandwidth-tbs", "3"], "--memory-gib: nan is out of range"),
        (["plan", "--serve", "--gpu", "h200", "--layout", "a=am*²"], "--layout: .*repeats"),
    ],
)
def test_options_that_would_not_be_read_are_refused(command, message):
    with pytest.raises(ValueError, match=message):
        RUNNER.invoke(app, command, catch_exceptions=False)

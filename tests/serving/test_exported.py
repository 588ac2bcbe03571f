"""Exported hybrids in vLLM without the plugin: the tokens that transformers generates with the hybrid itself."""

import importlib.util
import json

import pytest
import torch
from serving_examples import VOCABULARY, answers, draw_prompts, needs_vllm, random_hybrid, run_jobs
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hybridize.models import convert_model, export_native, load_model, save_hybrid
from hybridize.spec import AttentionSpec, GatedDeltaNetSpec, LayoutSpec

TOKENS = 16
SIZES = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "eos_token_id": None,
}


@needs_vllm
@pytest.mark.parametrize("hidden_size", [128, 160, 192])
def test_mamba2_is_served_without_the_plugin_with_and_without_heads_of_zeros(tmp_path, hidden_size):
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": hidden_size, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    hybrid = random_hybrid(LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True)).eval(), "a22a")
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    save_hybrid(hybrid, None, tmp_path / "hybrid")
    report = export_native(tmp_path / "hybrid", tmp_path / "exported")
    assert bool(report["notes"]) == (hidden_size != 128)
    prompts = draw_prompts(120, 5, 64, 1, 33, 300)
    options = {"enable_prefix_caching": False}  # vLLM's prefix caching of Mamba-2 has no kernel on a CPU
    jobs = [
        {"model": tmp_path / "exported", "options": options | more, "calls": [prompts, prompts[1:2]], "tokens": TOKENS}
        for more in ({}, {"max_num_batched_tokens": 32})
    ]
    expected = answers(tmp_path / "hybrid", prompts, TOKENS)
    for result in run_jobs(jobs, tmp_path, VLLM_PLUGINS=""):
        assert result.get("tokens") == [expected, expected[1:2]], result


@needs_vllm
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="vLLM's Qwen 3.5 needs torchvision")
def test_gated_delta_nets_are_served_without_the_plugin(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    teacher = Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    mixer = GatedDeltaNetSpec(qk_norm="none")
    hybrid = convert_model(teacher, LayoutSpec(layers=(mixer, mixer, AttentionSpec(), mixer)))
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.4)  # some are small, some below zero
            elif ".mixer." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_hybrid(hybrid.to(torch.bfloat16), None, tmp_path / "hybrid")
    export_native(tmp_path / "hybrid", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "qwen3_5_text"
    prompts = draw_prompts(120, 5, 64, 1, 33, 300)
    options = {"dtype": "bfloat16", "enable_prefix_caching": False}
    job = {"model": tmp_path / "exported", "options": options, "calls": [prompts], "tokens": TOKENS}
    (result,) = run_jobs([job], tmp_path, VLLM_PLUGINS="")
    assert "error" not in result, result
    model, num_equal = load_model(tmp_path / "hybrid", dtype=torch.float32), 0
    for prompt, tokens in zip(prompts, result["tokens"][0], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        lost = logits.max(dim=-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert lost.max() < 0.1 * logits.std()  # a token that bf16 could not tell from the likeliest
        num_equal += not lost.any()
    assert num_equal >= len(prompts) // 2

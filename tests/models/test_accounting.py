"""The cache is accounted for to the byte."""

import torch
from transformers import DynamicCache, MistralConfig

from hybridize.models import cache_bytes, hybrid_config_class, resolve_layout
from hybridize.spec import LayoutSpec, Mamba1Spec

PAPER = {
    "hidden_size": 5120,
    "num_hidden_layers": 50,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
}


def test_paper_model_costs_what_the_paper_says():
    teacher = MistralConfig(**PAPER)
    assert cache_bytes(teacher, torch.bfloat16) == cache_bytes(teacher, torch.float16)
    assert tuple(cache_bytes(teacher, torch.bfloat16)) == (200 * 1024, 0)
    layout = resolve_layout(teacher, LayoutSpec.replace(50, range(20, 50), Mamba1Spec()))
    hybrid = hybrid_config_class("mistral")(**PAPER, mixers=[mixer.model_dump() for mixer in layout.layers])
    per_token, state = cache_bytes(hybrid, torch.bfloat16)
    assert per_token == 80 * 1024
    assert state == 30 * 4096 * (16 * 4 + 4 * 2)


def test_count_equals_the_cache_in_use(make_teacher, make_hybrid, draw_tokens):
    hybrid = make_hybrid(make_teacher("llama"), [0, 2])
    cache = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        hybrid(draw_tokens(1, 9), past_key_values=cache)
    used = 0
    for layer in cache.layers:
        tensors = [layer.keys, layer.values] if hasattr(layer, "keys") else []
        tensors += [
            *getattr(layer, "conv_states", {}).values(),
            *getattr(layer, "recurrent_states", {}).values(),
        ]
        used += sum(tensor.nbytes for tensor in tensors)
    per_token, state = cache_bytes(hybrid.config, torch.float32)
    assert used == 9 * per_token + state

"""A tiny teacher of every family, whatever is special of its attention switched on."""

import torch

from hybridize.models import FAMILIES

NUM_LAYERS = 4
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SLIDING, FULL = "sliding_attention", "full_attention"
SPECIAL = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 6},
    "ministral": {"sliding_window": 6, "layer_types": [SLIDING, FULL] * 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    "granite": {"attention_bias": True, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    "starcoder2": {"sliding_window": 6},
    "cohere2": {"sliding_window": 6, "sliding_window_pattern": 2, "logit_scale": 0.25},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
}


def build_member(model_type, attention=None):
    """By default with the family's own attention. No parameter is at a value, such as 0, at which it has no effect."""
    torch.manual_seed(0)
    row = FAMILIES[model_type]
    config = row.teacher_config()(**SIZES | SPECIAL.get(model_type, {}), attn_implementation=attention)
    model = row.teacher_model()(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model

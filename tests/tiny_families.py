"""A tiny random teacher of every family of the table, with whatever is special of the family switched on."""

import torch

from hybridize.models import FAMILIES

SLIDING, FULL = "sliding_attention", "full_attention"
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
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 8}
# Windows are shorter than what the tests generate. None: the family's config has no such field.
TINY = {
    "llama": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "ministral": {"sliding_window": 6, "layer_types": [SLIDING, FULL] * 2},
    "ministral3": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "attention_bias": True},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
    },
    "phi3": {},
    "olmo2": {"attention_bias": True},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    "granite": {
        "attention_bias": True,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
    "starcoder2": {"sliding_window": 6},
    "cohere2": {"sliding_window": 6, "sliding_window_pattern": 2, "logit_scale": 0.25},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": None, "head_dim": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
}


def build_teacher(model_type, **changes):
    """The teacher, with no parameter at a value, such as a bias of 0, at which it might as well not be there.

    Args:
        model_type: of the family's row.
        **changes: to its config, such as the implementation of its attention.
    """
    torch.manual_seed(0)
    row = FAMILIES[model_type]
    fields = {name: value for name, value in (SIZES | TINY[model_type]).items() if value is not None}
    teacher = row.teacher_model()(row.teacher_config()(**fields | changes, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return teacher

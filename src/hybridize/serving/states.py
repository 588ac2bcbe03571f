"""How large the mixers' states are and in which dtype they are kept, by vLLM's configuration. Imports no vllm."""

from typing import Any

import torch

from hybridize.mixers import build_mixer
from hybridize.serving.pages import StatePage
from hybridize.serving.shards import part_of_spec
from hybridize.spec import MixerSpec
from hybridize.spec.mixers import AttentionSpec, IdentitySpec, SlidingWindowSpec

# By the names of vLLM's options.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A recurrence's state in fp16 can overflow.
SSM_DTYPES = ("float32", "bfloat16")


def has_state(spec: MixerSpec) -> bool:
    """Whether a mixer keeps a state of its own in the cache."""
    return not isinstance(spec, AttentionSpec | SlidingWindowSpec | IdentitySpec)


def state_dtypes(vllm_config: Any) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which states are kept: the recurrence's, by default fp32, and the convolution's, the model's.

    Raises:
        ValueError: a dtype is asked for that they cannot be kept in.
    """
    cache = vllm_config.cache_config
    ssm, conv = cache.mamba_ssm_cache_dtype, cache.mamba_cache_dtype
    if ssm not in ("auto", *SSM_DTYPES):
        raise ValueError(
            f"mamba_ssm_cache_dtype: {ssm!r} cannot hold the states of mixers; use one of {', '.join(SSM_DTYPES)}"
        )
    if conv not in ("auto", *_DTYPES):
        raise ValueError(
            f"mamba_cache_dtype: {conv!r} cannot hold the inputs of convolutions; use auto or one of "
            f"{', '.join(_DTYPES)}"
        )
    ssm_dtype = torch.float32 if ssm == "auto" else _DTYPES[ssm]
    return ssm_dtype, vllm_config.model_config.dtype if conv == "auto" else _DTYPES[conv]


def state_page_bytes(vllm_config: Any) -> int:
    """Bytes of the largest state of a model's layers on one rank; 0 if no layer has one.

    Raises:
        ValueError: the ranks cannot divide a mixer.
    """
    config, num_ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    largest, sized = 0, set()
    for layer, spec in enumerate(config.layout.layers):
        if has_state(spec) and spec not in sized:
            sized.add(spec)
            with torch.device("meta"):
                mixer = build_mixer(part_of_spec(spec, num_ranks, f"layer {layer}"), config.hidden_size)
            largest = max(largest, StatePage.of(mixer.state_shapes(1), *state_dtypes(vllm_config)).num_bytes)
    return largest

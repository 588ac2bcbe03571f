"""What is checked and set before vLLM loads anything: an error here comes at once, and says what to change."""

from typing import Any

import torch
import vllm
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from hybridize.serving.shards import part_of_spec
from hybridize.serving.states import state_dtypes
from hybridize.serving.versions import SINKS_ON_CPU, release_of
from hybridize.spec.mixers import SlidingWindowSpec


class HybridChecks(VerifyAndUpdateConfig):
    """Checks the configuration under which a hybrid is to be served."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse what cannot be served, and fill in what is left open.

        Raises:
            ValueError: names the option, its value and what to use instead.
        """
        _check_features(vllm_config)
        _check_ranks(vllm_config)
        _check_sinks(vllm_config)
        state_dtypes(vllm_config)
        cache = vllm_config.cache_config
        if cache.mamba_ssm_cache_dtype == "auto":
            cache.mamba_ssm_cache_dtype = "float32"


def _check_features(vllm_config: Any) -> None:
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "speculative_config: it is set, but the state of a mixer cannot be taken back to before a rejected token; "
            "serve hybrids without speculative decoding"
        )


def _check_ranks(vllm_config: Any) -> None:
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    for layer, spec in enumerate(vllm_config.model_config.hf_config.layout.layers):
        part_of_spec(spec, num_ranks, f"layer {layer}")


def _check_sinks(vllm_config: Any) -> None:
    release, dtype = release_of(vllm.__version__), vllm_config.model_config.dtype
    if not current_platform.is_cpu() or dtype == torch.bfloat16 or (release or SINKS_ON_CPU) >= SINKS_ON_CPU:
        return
    for layer, spec in enumerate(vllm_config.model_config.hf_config.layout.layers):
        if isinstance(spec, SlidingWindowSpec) and spec.sink:
            raise ValueError(
                f"dtype: {dtype}, but layer {layer} has a window with sinks, and on a CPU vLLM {vllm.__version__} "
                f"takes sinks in bfloat16 only; use --dtype bfloat16, or vLLM 0.{SINKS_ON_CPU[1]}"
            )

"""What is checked and set before vLLM loads anything: an error here comes at once, and says what to change."""

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from hybridize.serving.shards import part_of_spec
from hybridize.serving.states import state_dtypes

logger = init_logger(__name__)


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

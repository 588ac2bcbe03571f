"""A KV connector of vLLM's by which a measurement starts in the middle: a sequence's cache counts as filled at once.

To know what a decode step costs at a context of 16k tokens, vLLM would first have to compute those tokens for a whole
crowd, which takes minutes. What is in the cache does not change how fast it is read. So this connector tells vLLM's
scheduler that the first tokens of a prompt have been computed elsewhere, as a prefill server's connector does, and
loads nothing. Blocks, block tables and everything else are as if the tokens had been computed. The cache is filled with
random numbers when it is made: zeros would cost less power, and so run faster.

It also notes when each step is scheduled and with how many requests and tokens; steps are timed by that.

Importing this module needs vLLM.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA

FILLED_TOKENS = "filled_tokens"
"""The key in a request's `kv_transfer_params` that says how many tokens count as computed."""


@dataclass(frozen=True)
class Step:
    """A step of the engine.

    Attributes:
        seconds: when it was scheduled, by `time.perf_counter`.
        requests: with a token in it.
        tokens: of all requests.
    """

    seconds: float
    requests: int
    tokens: int


STEPS: list[Step] = []
"""The steps of the engine in this process, in their order."""

CACHES: list[Any] = []
"""What vLLM says of the cache it has made (`KVCacheConfig`), newest last."""


class NothingToLoad(KVConnectorMetadata):
    """What the scheduler's half sends to the worker's."""


class FilledCache(KVConnectorBase_V1, SupportsHMA):
    """Says that tokens are in the cache that nobody has computed."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        CACHES.append(kv_cache_config)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Fill keys and values with random numbers.

        Mixers' states lie in the same memory; what they get is finite, too.
        """
        for cache in kv_caches.values():
            if isinstance(cache, torch.Tensor) and cache.is_floating_point():
                cache.normal_()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is on its way."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Save nothing."""

    def wait_for_save(self) -> None:
        """Nothing is on its way."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens beyond those computed that count as filled, and that they are there at once."""
        filled = (request.kv_transfer_params or {}).get(FILLED_TOKENS, 0)
        return max(0, min(filled, request.num_tokens - 1) - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks stay as they are."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Note the step that has just been scheduled."""
        scheduled = scheduler_output.num_scheduled_tokens
        STEPS.append(Step(time.perf_counter(), len(scheduled), scheduler_output.total_num_scheduled_tokens))
        return NothingToLoad()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are free at once."""
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Blocks of all groups are free at once."""
        return False, None

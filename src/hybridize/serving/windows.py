"""Sliding windows and sinks: vLLM's own attention of a layer, told to see the last tokens only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import maybe_prefix

from hybridize.models import ModelFamily
from hybridize.serving.loading import Target
from hybridize.serving.shards import Shard
from hybridize.spec.mixers import SlidingWindowSpec


@contextmanager
def windows_in_place(config: Any, family: ModelFamily, prefix: str) -> Iterator[None]:
    """While vLLM builds a model, give the attention of its `sliding_window` layers their windows and sinks.

    vLLM's attention is told of its window when it is made, deep inside a family's code, and can be told then only. So
    it is met there, by the layer's name, for as long as one model is built.
    """
    windows = {
        maybe_prefix(prefix, f"{family.attention_path(layer)}."): spec
        for layer, spec in enumerate(config.layout.layers)
        if isinstance(spec, SlidingWindowSpec)
    }
    if not windows:
        yield
        return
    original = Attention.__init__

    def init(self: Any, num_heads: int, *args: Any, **kwargs: Any) -> None:
        name = kwargs.get("prefix", "")
        spec = next((spec for start, spec in windows.items() if name.startswith(start)), None)
        if spec is not None:
            cache_config = kwargs.get("cache_config")
            own = kwargs.get("per_layer_sliding_window") or getattr(cache_config, "sliding_window", None)
            kwargs["per_layer_sliding_window"] = min(spec.window, own or spec.window)
            if spec.sink:
                kwargs["sinks"] = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32), requires_grad=False)
        original(self, num_heads, *args, **kwargs)
        if spec is not None and spec.sink:
            self.sinks = kwargs["sinks"]

    Attention.__init__ = init
    try:
        yield
    finally:
        Attention.__init__ = original


def sink_targets(model: Any, config: Any, family: ModelFamily) -> dict[str, Target]:
    """Where the sinks of a checkpoint go."""
    targets: dict[str, Target] = {}
    num_heads = config.num_attention_heads
    rule = Shard((num_heads,)) if get_tensor_model_parallel_world_size() > 1 else None
    for layer, spec in enumerate(config.layout.layers):
        if isinstance(spec, SlidingWindowSpec) and spec.sink:
            path = family.attention_path(layer)
            for module in model.get_submodule(path).modules():
                if isinstance(module, Attention):
                    targets[f"{path}.sink"] = Target(module.sinks, rule)
    return targets

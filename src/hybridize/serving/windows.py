"""Sliding windows and sinks: vLLM's own attention of a layer, told to see the last tokens only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import maybe_prefix

from hybridize.models import ModelFamily
from hybridize.spec.mixers import SlidingWindowSpec


@dataclass
class PlacedWindows:
    """What has been given to a model's attention layers, by the paths of their modules.

    Attributes:
        paths: those that have got their window.
        sinks: the sinks of this rank's heads, in the model's dtype, as vLLM's kernels want them.
    """

    paths: set[str] = field(default_factory=set)
    sinks: dict[str, nn.Parameter] = field(default_factory=dict)


@contextmanager
def windows_in_place(config: Any, family: ModelFamily, prefix: str) -> Iterator[PlacedWindows]:
    """While vLLM builds a model, give the attention of its `sliding_window` layers their windows and sinks.

    vLLM's attention is told of its window when it is made, deep inside a family's code, and can be told then only. So
    it is met there, by the layer's name, for as long as one model is built. Where vLLM has no attention with sinks for
    a device, it says so then.

    Yields:
        What has been given so far.
    """
    windows = {
        maybe_prefix(prefix, f"{family.attention_path(layer)}."): (family.attention_path(layer), spec)
        for layer, spec in enumerate(config.layout.layers)
        if isinstance(spec, SlidingWindowSpec)
    }
    placed = PlacedWindows()
    if not windows:
        yield placed
        return
    original = Attention.__init__

    def init(self: Any, num_heads: int, *args: Any, **kwargs: Any) -> None:
        for start, (path, spec) in windows.items():
            if kwargs.get("prefix", "").startswith(start):
                cache_config = kwargs.get("cache_config")
                own = kwargs.get("per_layer_sliding_window") or getattr(cache_config, "sliding_window", None)
                kwargs["per_layer_sliding_window"] = min(spec.window, own or spec.window)
                placed.paths.add(path)
                if spec.sink:
                    placed.sinks[path] = nn.Parameter(torch.zeros(num_heads), requires_grad=False)
                    kwargs["sinks"] = placed.sinks[path]
        original(self, num_heads, *args, **kwargs)

    Attention.__init__ = init
    try:
        yield placed
    finally:
        Attention.__init__ = original

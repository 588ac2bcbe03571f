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
from hybridize.models.window import window_of
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
    """While vLLM builds a model, give its attention layers the windows and sinks that the hybrid's config says.

    Those of attention that the teacher had are given only where vLLM's code of the family leaves it to its cache's one
    setting for all layers, as for Mistral: a hybrid's layers are not all alike, and then there is no such setting.

    vLLM's attention is told of its window when it is made, deep inside a family's code, and can be told then only. So
    it is met there, by the layer's name, for as long as one model is built. Where vLLM has no attention with sinks for
    a device, it says so then.

    Yields:
        What has been given so far.
    """
    layers = {
        maybe_prefix(prefix, f"{family.attention_path(layer)}."): (layer, spec)
        for layer, spec in enumerate(config.layout.layers)
    }
    placed = PlacedWindows()
    original = Attention.__init__

    def init(self: Any, num_heads: int, *args: Any, **kwargs: Any) -> None:
        name = kwargs.get("prefix", "")
        for layer, spec in (entry for start, entry in layers.items() if name.startswith(start)):
            is_window, path = isinstance(spec, SlidingWindowSpec), family.attention_path(layer)
            if is_window or kwargs.get("per_layer_sliding_window") is None:
                kwargs["per_layer_sliding_window"] = window_of(spec, config, layer)
            if is_window:
                placed.paths.add(path)
            if is_window and spec.sink:
                placed.sinks[path] = nn.Parameter(torch.zeros(num_heads), requires_grad=False)
                kwargs["sinks"] = placed.sinks[path]
        original(self, num_heads, *args, **kwargs)

    Attention.__init__ = init
    try:
        yield placed
    finally:
        Attention.__init__ = original

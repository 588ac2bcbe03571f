"""Measuring speed: a model's throughput, and kernels beside their rivals and the hardware's floor.

Names are resolved at first use: each measurement imports what it measures, and nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridize.bench.kernels import measure_kernels
    from hybridize.bench.loss import measure_loss
    from hybridize.bench.throughput import measure_throughput

_HOMES = {"measure_kernels": "kernels", "measure_loss": "loss", "measure_throughput": "throughput"}

__all__ = ["measure_kernels", "measure_loss", "measure_throughput"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

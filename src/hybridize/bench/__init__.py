"""Measuring speed: a model's throughput, and kernels beside their rivals and the hardware's floor."""

from typing import Any

__all__ = ["measure_kernels", "measure_loss", "measure_throughput"]


def __getattr__(name: str) -> Any:
    """Each measurement imports what it measures, and nothing else."""
    if name == "measure_throughput":
        from hybridize.bench.throughput import measure_throughput as found
    elif name == "measure_kernels":
        from hybridize.bench.kernels import measure_kernels as found
    elif name == "measure_loss":
        from hybridize.bench.loss import measure_loss as found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found

"""Measuring speed: generation throughput."""

from hybridize.bench.throughput import measure_throughput

__all__ = ["measure_throughput"]

"""Measuring speed: generation throughput."""

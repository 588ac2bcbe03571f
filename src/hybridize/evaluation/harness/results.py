"""lm-evaluation-harness's results as plain data for a manifest."""

from collections.abc import Mapping
from numbers import Real
from typing import Any


def summarise_results(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each task and group measured.

    Args:
        results: what `lm_eval.evaluate` returned.

    Returns:
        By name, for those that measured anything: the task's first metric as `metric`, `value`, `stderr` (None if there
        is none); `num_samples`, `num_fewshot` and `version`; and `metrics`, all of them by name, each `value` and
        `stderr`. A metric's name has its filter behind a comma, if it has one.
    """
    return {
        name: summary
        for name, measured in results["results"].items()
        if (summary := _summarise(name, measured, results)) is not None
    }


def _summarise(name: str, measured: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any] | None:
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in measured.items():
        metric, comma, rule = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        error = measured.get(f"{metric}_stderr,{rule}")
        metrics[metric if rule == "none" else key] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, Real) else None,
        }
    if not metrics:
        return None
    first = next(iter(metrics))
    counts = measured.get("sample_count") or {"": measured["sample_len"]}  # a group's, or a task's
    return {
        "metric": first,
        **metrics[first],
        "num_samples": max(counts.values()),
        "num_fewshot": results["n-shot"].get(name),
        "version": results["versions"].get(name),
        "metrics": metrics,
    }

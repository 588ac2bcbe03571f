"""When a distillation ends before its last step.

The rule reads the records of the steps and nothing else. These survive a kill, so a resumed run stops where the
undisturbed one would.
"""

import math
from collections.abc import Sequence
from typing import Any

from hybridize.spec.stages import StopSpec

HELDOUT = "heldout_nats"
"""A step's divergence on rows held out, in nat per token, in the records of the steps that were looked at."""


def is_due(stop: StopSpec | None, step: int) -> bool:
    """Whether the held-out loss is to be measured after a step."""
    return stop is not None and step % stop.every == 0


def why_stop(stop: StopSpec | None, records: Sequence[dict[str, Any]]) -> str:
    """Why training is over, in words; empty if it is not.

    Args:
        stop: the rule; there may be none.
        records: of all steps so far.
    """
    looks = [(record["step"], record[HELDOUT]) for record in records if HELDOUT in record]
    if stop is None or not looks:
        return ""
    last_step, last = looks[-1]
    if stop.below is not None and last < stop.below:
        return f"stopped at step {last_step}: the held-out loss, {last:.4g} nat per token, is below {stop.below:g}"
    if stop.patience is None:
        return ""
    best, best_step, num_vain = math.inf, 0, 0
    for step, loss in looks:
        if loss < best - stop.min_delta:
            best, best_step, num_vain = loss, step, 0
        else:
            num_vain += 1
    if num_vain < stop.patience:
        return ""
    looked = "one look" if num_vain == 1 else f"{num_vain} looks in a row"
    return (
        f"stopped at step {last_step}: {looked} brought no improvement of more than {stop.min_delta:g} over the "
        f"held-out loss at step {best_step}, {best:.4g} nat per token"
    )

"""Keeps lm-evaluation-harness quiet, and keeps what it warns of: prompts that were cut are no noise."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

# What it warns of however right all is: that a task reads its data by a function.
_NOISE = ("Custom kwargs can be passed to `--metadata`",)


class Warnings(logging.Handler):
    """Collects warnings; those that differ in numbers only are one, with a count."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._first: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        text = " ".join(record.getMessage().split())
        if not any(noise in text for noise in _NOISE):
            kind = re.sub(r"[0-9]+", "0", text)
            self._first.setdefault(kind, text)
            self._counts[kind] += 1

    @property
    def texts(self) -> list[str]:
        """Each kind once, in order."""
        return [
            text if self._counts[kind] == 1 else f"{text} ({self._counts[kind]} such warnings)"
            for kind, text in self._first.items()
        ]


@contextmanager
def quietly() -> Iterator[Warnings]:
    """No log lines and no bars of lm-evaluation-harness, nor of transformers as it loads; as before when it is over."""
    import lm_eval.api.task as tasks
    from transformers.utils import logging as transformers_logging

    logger, kept = logging.getLogger("lm_eval"), Warnings()
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    harness: Any = tasks
    bar, had_bars = harness.tqdm, transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    try:
        logger.handlers, logger.propagate = [kept], False
        logger.setLevel(logging.WARNING)
        harness.tqdm = partial(bar, disable=True)  # it has no option for this bar
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        yield kept
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
        harness.tqdm = bar
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()

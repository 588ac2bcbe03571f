"""What a person sees while stages run: rich progress bars on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[..., None]
"""Called with (done, total) and optionally a note to show behind the bar."""


COLUMNS = (
    TextColumn("  {task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[note]}"),
)
"""Of a progress bar; a task has a field `note`."""


class Reporter:
    """Says what is going on.

    Args:
        console: where to; by default standard error, so that results on standard output stay clean.
        quiet: say nothing.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def bar(self, title: str) -> Iterator[Advance]:
        """A progress bar for one long piece of work; without a terminal, a line at every tenth of it."""
        if not self.console.is_terminal:
            yield self._lines(title)
            return
        with Progress(*COLUMNS, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=None, note="")

            def advance(done: int, total: int, note: str = "") -> None:
                progress.update(task, completed=done, total=total, note=note)

            yield advance

    def _lines(self, title: str) -> Advance:
        shown = -1

        def advance(done: int, total: int, note: str = "") -> None:
            nonlocal shown
            tenth = 10 * done // max(total, 1)
            if tenth > shown:
                shown = tenth
                self.say(f"  {title}: {done}/{total} {note}".rstrip())

        return advance


def quiet_libraries() -> None:
    """Turn off the bars and notices of the libraries underneath: a run has bars of its own."""
    from datasets.utils.logging import disable_progress_bar as datasets_bar_off
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets_bar_off()

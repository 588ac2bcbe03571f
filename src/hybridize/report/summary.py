"""The result in a sentence and in a small table for the terminal, and how numbers are written everywhere."""

from typing import TYPE_CHECKING

from hybridize.report.data import ReportData, Score

if TYPE_CHECKING:
    from rich.table import Table


EN_DASH = "\N{EN DASH}"


def percent(share: float) -> str:
    """`0.8571` as `85.7 %`, with a space that does not break."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def interval(score: Score) -> str:
    """The 95% interval as `52.1-66.4 %`."""
    return f"{100 * score.low:.1f}{EN_DASH}{percent(score.high)}"


def headline(data: ReportData) -> str | None:
    """What is left of the teacher, in a sentence; None unless teacher and distilled hybrid were both judged.

    The share is accuracy over the teacher's accuracy. The control's clause stands only where it was run.
    """
    teacher, distilled = data.evaluation("teacher"), data.evaluation("distilled")
    if teacher is None or distilled is None or teacher.overall.accuracy == 0:
        return None
    kept = percent(distilled.overall.accuracy / teacher.overall.accuracy)
    counts = (
        f"{distilled.overall.correct} of {distilled.overall.total} right, "
        f"the teacher {teacher.overall.correct} of {teacher.overall.total}"
    )
    sentence = f"The distilled hybrid keeps {kept} of the teacher's accuracy ({counts})"
    control = data.evaluation("random init: distilled")
    if control is None:
        return sentence + "."
    control_kept = percent(control.overall.accuracy / teacher.overall.accuracy)
    return f"{sentence}; the same budget from random initialisation: {control_kept}."


def kept_of_teacher(data: ReportData, score: Score) -> str:
    """A score as a share of the teacher's accuracy; a dash without a teacher that got anything right."""
    teacher = data.evaluation("teacher")
    if teacher is None or teacher.overall.accuracy == 0:
        return EN_DASH
    return percent(score.accuracy / teacher.overall.accuracy)


def console_summary(data: ReportData) -> "Table":
    """Accuracy of every judged model with its controls, for the terminal.

    Args:
        data: the run.

    Returns:
        A rich table; its caption is the headline, where there is one.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(data.title), caption=Text(headline(data) or ""), box=box.SIMPLE_HEAD)
    table.add_column("Model")
    for heading in ("Right", "Accuracy", "95% interval", "Of teacher"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in data.evaluations:
        score = entry.overall
        table.add_row(
            Text(f"{entry.label} (control)" if entry.is_control else entry.label),
            f"{score.correct} of {score.total}",
            percent(score.accuracy),
            interval(score),
            kept_of_teacher(data, score),
            style="dim" if entry.is_control else None,
        )
    return table


def number(value: float | int | None) -> str:
    """A count with thousands set apart, a measurement to four digits, a dash for nothing."""
    if value is None:
        return EN_DASH
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.4g}"


def short_count(value: float) -> str:
    """`131072` as `131k`, for axes; powers of ten."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def short_bytes(value: float) -> str:
    """`1048576` as `1 MiB`; powers of two."""
    for exponent, suffix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(value) >= 2**exponent:
            return f"{value / 2**exponent:.3g} {suffix}"
    return f"{value:.3g} B"


def duration(seconds: float) -> str:
    """`4210` as `1 h 10 min`; the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"

"""The result in a sentence, in a few figures, and in a small table for the terminal."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridize.report.data import TEACHER, Model, ReportData
from hybridize.report.measures import Evaluation, Ranking, Score
from hybridize.report.numbers import (
    EN_DASH,
    NBSP,
    and_list,
    interval,
    number,
    percent,
    short_bytes,
    times,
    token_count,
)
from hybridize.report.study import Measure, Suite, main_setting, main_suite

if TYPE_CHECKING:
    from rich.table import Table

_UNTRAINED = "converted"
_RANDOM = "random init: distilled"


@dataclass(frozen=True)
class KeyFigure:
    """A figure of the page's first screen: what it is, its value, and what to know about it."""

    name: str
    value: str
    note: str = ""


def result_model(data: ReportData) -> Model | None:
    """The model that the report is about: the one named, else the last one judged that is not there to be beaten."""
    if data.result:
        return data.model(data.result)
    judged = [entry for entry in data.evaluations if entry.point != TEACHER and not entry.is_control]
    trained = [entry for entry in judged if not entry.point.endswith(_UNTRAINED)]
    if trained or judged:
        return data.model((trained or judged)[-1].key)
    names = [
        *(entry.model for entry in data.harness),
        *(entry.model for entry in data.throughput),
        *(entry.model for entry in data.texts),
    ]
    models = [data.model(name) for name in names]
    models = [model for model in models if not model.is_teacher and not model.is_control]
    return models[-1] if models else None


def headline(data: ReportData) -> str | None:
    """The result in one sentence; None where nothing was measured.

    Quality is told as a share of the teacher's, so it needs both. The control's clause stands only where one was
    judged by the same questions.
    """
    model = result_model(data)
    if model is not None:
        clauses = [clause for clause in (_quality(data, model), _speed(data, model), _text(data, model)) if clause]
        if clauses:
            spent = model.cumulative_tokens
            after = f", after training on {token_count(spent)}" if spent else ""
            return f"{_subject(data, model)} {and_list(clauses[:2])}{after}{_control(data, model)}."
    ranking = next((entry for entry in data.rankings if entry.is_scored and entry.order), None)
    if ranking is None:
        return None
    least = ranking.order[: max(1, min(3, len(ranking.order) // 4))]
    return (
        f"{ranking.method} ranks {len(ranking.order)} layers: {and_list([str(layer) for layer in least])} "
        f"matter{'s' if len(least) == 1 else ''} least ({_scored(ranking, least[0])}), {ranking.order[-1]} most "
        f"({_scored(ranking, ranking.order[-1])})."
    )


def _scored(ranking: Ranking, layer: int) -> str:
    return f"{number(ranking.scores[layer])} {ranking.unit}"


def _judged(data: ReportData, name: str, suite: Suite) -> Evaluation | None:
    return next((e for e in data.evaluations if e.key == name and e.suite == suite.name), None)


def _subject(data: ReportData, model: Model) -> str:
    points = [entry.point for entry in data.evaluations if entry.key == model.name]
    subject = f"The hybrid “{model.label}”"
    if "distilled" in points:
        alike = {e.key for e in data.evaluations if e.point == "distilled" and not e.is_control}
        subject = "The distilled hybrid" + (f" “{model.label}”" if len(alike) > 1 else "")
    elif _UNTRAINED in points:
        subject = "The hybrid as converted, untrained,"
    if model.num_mixers is None or not data.layout:
        return subject
    return f"With {model.num_mixers} of {len(data.layout)} layers as mixers, t{subject[1:]}"


def _quality(data: ReportData, model: Model) -> str | None:
    suite = main_suite(data)
    if suite is None:
        return None
    mine, teacher = suite.of(model.name), suite.teacher
    if mine is None or teacher is None or teacher.value == 0:
        return None
    entries = [None if suite.is_harness else _judged(data, name, suite) for name in (model.name, TEACHER)]
    counts = f"{percent(mine.value)}, the teacher {percent(teacher.value)}, {suite.asked}"
    if entries[0] and entries[1]:
        right = [f"{number(entry.overall.correct)} of {number(entry.overall.total)}" for entry in entries if entry]
        counts = f"{right[0]} right, the teacher {right[1]}"
    return f"keeps {percent(mine.value / teacher.value)} of the teacher's accuracy ({counts})"


def _speed(data: ReportData, model: Model) -> str | None:
    setting = main_setting(data)
    speed = setting.of(model.name) if setting else None
    if setting is None or speed is None or model.is_teacher:
        return None
    if setting.is_relative:
        return f"generates {times(speed.value)} as many tokens per second{setting.place}"
    return f"generates {number(round(speed.value))} tokens per second{setting.place}"


def _text(data: ReportData, model: Model) -> str | None:
    mine = next((entry for entry in data.texts if entry.model == model.name), None)
    if mine is None:
        return None
    teacher = next((entry for entry in data.texts if entry.model == TEACHER and entry.text == mine.text), None)
    beside = f" (the teacher {number(teacher.perplexity)})" if teacher else ""
    return f"has a perplexity of {number(mine.perplexity)} on {mine.text}{beside}"


def _control(data: ReportData, model: Model) -> str:
    """What the same from random initialisation gives; that it saw as many tokens is said only where it is known."""
    suite, control = main_suite(data), data.evaluation(_RANDOM)
    points = [entry.point for entry in data.evaluations if entry.key == model.name]
    if suite is None or suite.is_harness or control is None or "distilled" not in points:
        return ""
    teacher, score = suite.teacher, suite.of(control.key)
    if teacher is None or score is None or teacher.value == 0 or _quality(data, model) is None:
        return ""
    spent = data.model(control.key).cumulative_tokens
    budget = ""
    if spent is not None and spent == model.cumulative_tokens:
        budget = " on as many tokens"
    elif spent is not None:
        budget = f" on {token_count(spent)}"
    return f"; from random initialisation{budget}: {percent(score.value / teacher.value)}"


def key_figures(data: ReportData) -> list[KeyFigure]:
    """The page's first figures: what was measured of the model that it is about, beside the teacher."""
    model, suite, setting = result_model(data), main_suite(data), main_setting(data)
    if model is None:
        return []
    figures = []
    teacher = suite.teacher if suite else None
    if teacher:
        figures.append(KeyFigure("Teacher's accuracy", percent(teacher.value), _range(teacher)))
    mine = suite.of(model.name) if suite else None
    if mine:
        kept = f"{percent(mine.value / teacher.value)} of the teacher's; " if teacher and teacher.value else ""
        figures.append(KeyFigure("Hybrid's accuracy", percent(mine.value), kept + _range(mine)))
    if model.num_mixers is not None and data.layout:
        figures.append(KeyFigure("Mixer layers", f"{model.num_mixers} of {len(data.layout)}"))
    speed = setting.of(model.name) if setting else None
    if setting and speed:
        value = times(speed.value) if setting.is_relative else f"{number(round(speed.value))} tokens/s"
        note = f"{number(round(setting.speeds[model.name].tokens_per_second))} tokens/s; {setting}"
        figures.append(KeyFigure("Throughput", value, note if setting.is_relative else str(setting)))
    cache = {memory.key: memory for memory in data.memory}
    if model.name in cache and TEACHER in cache:
        before, after = cache[TEACHER].kv_bytes_per_token, cache[model.name].kv_bytes_per_token
        figures.append(KeyFigure("Cache per token", short_bytes(after), f"the teacher {short_bytes(before)}"))
    if spent := model.cumulative_tokens:
        stages = "one stage" if len(model.tokens) == 1 else f"{len(model.tokens)} stages"
        figures.append(KeyFigure("Tokens trained on", token_count(spent).split(NBSP)[0], stages))
    return figures


def _range(measure: Measure) -> str:
    if measure.low is None or measure.high is None:
        return ""
    return f"95%: {100 * measure.low:.1f}{EN_DASH}{percent(measure.high)}"


def kept_of_teacher(data: ReportData, score: Score, suite: str = "") -> str:
    """A score as a share of the teacher's in that suite; a dash without a teacher that got anything right."""
    teacher = next((e for e in data.evaluations if e.point == TEACHER and e.suite == suite), None)
    if teacher is None or teacher.overall.accuracy == 0:
        return EN_DASH
    return percent(score.accuracy / teacher.overall.accuracy)


def console_summary(data: ReportData) -> "Table":
    """Accuracy of every judged model with its controls, for the terminal; speed and tokens where they are known.

    Args:
        data: the run.

    Returns:
        A rich table; its caption is the headline, where there is one.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    setting = main_setting(data)
    spent = [data.model(entry.key).cumulative_tokens for entry in data.evaluations]
    table = Table(title=Text(data.title), caption=Text(headline(data) or ""), box=box.SIMPLE_HEAD)
    table.add_column("Model")
    headings = ["Right", "Accuracy", "95% interval", "Of teacher"]
    headings += [f"Speed in {setting.serving.engine}" if setting.serving else "Speed"] if setting else []
    headings += ["Tokens"] if any(spent) else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for entry, tokens in zip(data.evaluations, spent, strict=True):
        score = entry.overall
        cells = [
            f"{number(score.correct)} of {number(score.total)}",
            percent(score.accuracy),
            interval(score),
            kept_of_teacher(data, score, entry.suite),
        ]
        if setting:
            speed = setting.of(entry.key)
            absolute = EN_DASH if speed is None else f"{number(round(speed.value))}/s"
            cells.append(times(speed.value if speed else None) if setting.is_relative else absolute)
        if any(spent):
            cells.append(token_count(tokens).split(NBSP)[0] if tokens else EN_DASH)
        label = f"{entry.label}, {entry.suite}" if entry.suite else entry.label
        name = Text(f"{label} (control)" if entry.is_control else label)
        table.add_row(name, *cells, style="dim" if entry.is_control else None)
    return table

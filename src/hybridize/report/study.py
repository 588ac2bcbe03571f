"""What belongs together: measurements of one model, models under one measurement, quality beside speed."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from hybridize.report.data import TEACHER, Model, ReportData
from hybridize.report.measures import HarnessScore, Ranking, Score, Serving, Throughput
from hybridize.report.numbers import NBSP, TIMES

Z_95 = 1.959963984540054
"""The two-sided 95% quantile of the normal distribution."""

MANY_ROWS = 12
"""Rows of a chart; more are shown series by series."""

Entry = TypeVar("Entry")
Key = TypeVar("Key")


@dataclass(frozen=True)
class Measure:
    """A value with the ends of its 95% interval, where one is known; of several seeds, their mean and each one's."""

    value: float
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class SuiteRow:
    """One model's quality: over all tasks (None if that is not comparable), and by task."""

    model: Model
    overall: Measure | None
    tasks: Mapping[str, Measure]


@dataclass(frozen=True)
class Suite:
    """Models judged by the same questions.

    Attributes:
        name: what was asked; may be empty where there is one suite only.
        rows: models in the run's order, controls last.
        is_harness: whether the questions are lm-evaluation-harness tasks.
        asked: how many questions make up `overall`, in words.
        per_task: how many make up a task, in words; empty if unknown.
    """

    name: str
    rows: tuple[SuiteRow, ...]
    is_harness: bool
    asked: str
    per_task: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks, in their order of appearance."""
        return tuple(dict.fromkeys(task for row in self.rows for task in row.tasks))

    @property
    def teacher(self) -> Measure | None:
        """The teacher's quality over all tasks."""
        return self.of("teacher")

    def of(self, name: str) -> Measure | None:
        """A model's quality over all tasks."""
        return next((row.overall for row in self.rows if row.model.name == name and row.overall), None)


@dataclass(frozen=True)
class Setting:
    """Models whose speed was measured in the same way: by the run's own stages in batches of one size, or in a server.

    Attributes:
        batch_size: sequences at a time; None where each model had as many as fit.
        prompt_tokens: length of each prompt.
        new_tokens: generated for each.
        speeds: by model.
        serving: the server; None: there was none.
    """

    batch_size: int | None
    prompt_tokens: int
    new_tokens: int
    speeds: Mapping[str, Throughput]
    serving: Serving | None = None

    def __str__(self) -> str:
        if self.serving is not None:
            return str(self.serving)
        return f"batch of {self.batch_size}, {self.prompt_tokens:,}{NBSP}prompt and {self.new_tokens:,}{NBSP}new tokens"

    @property
    def is_relative(self) -> bool:
        """Whether the teacher was measured too, so that speeds can be given as multiples of its speed."""
        return TEACHER in self.speeds

    @property
    def unit(self) -> str:
        """What `of` is measured in."""
        where = f" in {self.serving.engine}" if self.serving else ""
        return f"throughput{where}, " + (f"{TIMES} the teacher's" if self.is_relative else "tokens per second")

    @property
    def place(self) -> str:
        """` in vLLM (1 to 16k tokens, NVIDIA H200)`, for a sentence; empty where there was no server."""
        served = self.serving
        return f" in {served.engine} ({served.scenario}, {served.device})" if served else ""

    @property
    def measured(self) -> dict[str, int]:
        """Models that stand for what was measured, each with how many others have its layout, and so its speed."""
        others = [speed.layout_of for speed in self.speeds.values()]
        return {name: others.count(name) for name, speed in self.speeds.items() if not speed.layout_of}

    @property
    def compares(self) -> bool:
        """Whether any model but the teacher was measured."""
        return any(name != TEACHER for name in self.speeds)

    def of(self, name: str) -> Measure | None:
        """A model's speed, in `unit`, with its slowest and fastest repeat; None if it was not measured."""
        speed = self.speeds.get(name)
        if speed is None:
            return None
        one = self.speeds[TEACHER].tokens_per_second if self.is_relative else 1.0
        return Measure(speed.tokens_per_second / one, speed.low / one, speed.high / one)


@dataclass(frozen=True)
class FrontierPoint:
    """A model's place: quality over what it costs to run."""

    model: Model
    x: float
    quality: Measure


@dataclass(frozen=True)
class Frontier:
    """Quality against speed, or against the next best that is known.

    Attributes:
        axis: what `x` is: the throughput, the number of mixer layers, or the cache per token.
        label: of the x axis, with its unit.
        points: in the run's order.
        note: what a reader must know; empty where throughput was measured.
    """

    axis: Literal["throughput", "mixers", "cache"]
    label: str
    points: tuple[FrontierPoint, ...]
    note: str = ""

    @property
    def best(self) -> tuple[FrontierPoint, ...]:
        """Points that no other one beats in both, controls left aside; from the left to the right."""
        sign = -1 if self.axis == "cache" else 1
        models = [point for point in self.points if not point.model.is_control]

        def beats(a: FrontierPoint, b: FrontierPoint) -> bool:
            gains = (sign * (a.x - b.x), a.quality.value - b.quality.value)
            return min(gains) >= 0 and max(gains) > 0

        kept = [point for point in models if not any(beats(other, point) for other in models)]
        return tuple(sorted(kept, key=lambda point: point.x))


def suites(data: ReportData) -> tuple[Suite, ...]:
    """The evaluations by suite, then the harness's results."""
    found = []
    for name, entries in grouped(data.evaluations, lambda entry: entry.suite).items():
        rows = []
        for entry in entries:
            model = data.model(entry.key)
            model = replace(model, label=entry.label, is_control=entry.is_control or model.is_control)
            tasks = {task: _measure(score) for task, score in entry.tasks.items()}
            rows.append(SuiteRow(model, _measure(entry.overall), tasks))
        asked = _span(entry.overall.total for entry in entries)
        each = _span(score.total for entry in entries for score in entry.tasks.values())
        per_task = f"{each} answers of each model" if each else ""
        found.append(Suite(name, _controls_last(rows), False, f"{asked} answers of each model", per_task))
    if harness := _harness_suite(data):
        found.append(harness)
    return tuple(found)


def arranged(suite: Suite, result: str) -> Suite:
    """The suite as charts show it: seeds of one model as one row, their mean; of many rows, each series by itself.

    Models whose labels differ in a last `, seed 1` only are seeds of one; so is the one without.

    Args:
        suite: all rows.
        result: name of the model to emphasise, which gives its name to the seeds that it stands among.
    """
    found = []
    for rows in grouped(suite.rows, lambda row: (seedless(row.model.label), row.model.is_control)).values():
        labels = [row.model.label for row in rows]
        if len(set(labels)) == len(labels) > 1:
            found.append(_mean_row(rows, result))
        else:
            found += rows
    if len(found) > MANY_ROWS:
        series = list(dict.fromkeys(row.model.series for row in found if row.model.series))
        order = {name: place for place, name in enumerate(series)}
        found.sort(key=lambda row: _group_of(row.model, order))
    return replace(suite, rows=tuple(found))


def _group_of(model: Model, order: Mapping[str, int]) -> int:
    """The place of a model's group: the teacher, series, other models, controls."""
    if model.is_control:
        return len(order) + 1
    return -1 if model.is_teacher else order.get(model.series, len(order))


def seedless(label: str) -> str:
    """A label without its last `, seed 1`."""
    return re.sub(r", seed \d+$", "", label)


def _mean_row(rows: Sequence[SuiteRow], result: str) -> SuiteRow:
    model = next((row.model for row in rows if row.model.name == result), rows[0].model)
    tasks = [task for task in rows[0].tasks if all(task in row.tasks for row in rows)]
    overall = [row.overall for row in rows if row.overall is not None]
    return SuiteRow(
        replace(model, label=f"{seedless(model.label)}, {len(rows)} seeds"),
        _mean(overall) if len(overall) == len(rows) else None,
        {task: _mean([row.tasks[task] for row in rows]) for task in tasks},
    )


def _mean(seeds: Sequence[Measure]) -> Measure:
    values = tuple(measure.value for measure in seeds)
    return Measure(sum(values) / len(values), seeds=values)


def _span(counts: Iterable[int | None]) -> str:
    """`100`, or `100 to 250`; nothing if any is unknown, or there are none."""
    known = sorted(set(counts), key=lambda count: count or 0)
    if not known or None in known:
        return ""
    return f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def _measure(score: Score) -> Measure:
    return Measure(score.accuracy, score.low, score.high)


def _controls_last(rows: Sequence[SuiteRow]) -> tuple[SuiteRow, ...]:
    return tuple(sorted(rows, key=lambda row: row.model.is_control))


def _harness_suite(data: ReportData) -> Suite | None:
    """The harness's shares by task; a model without all tasks has no mean, for it would be of other questions."""
    shares = [score for score in data.harness if score.is_share]
    if not shares:
        return None
    tasks = list(dict.fromkeys(score.task for score in shares))
    rows = []
    for name, scores in grouped(shares, lambda score: score.model).items():
        first: dict[str, HarnessScore] = {}
        for score in scores:
            first.setdefault(score.task, score)
        measures = {task: _harness_measure([first[task]]) for task in tasks if task in first}
        overall = _harness_measure(list(first.values())) if len(first) == len(tasks) else None
        rows.append(SuiteRow(data.model(name), overall, measures))
    asked = "one task" if len(tasks) == 1 else f"{len(tasks)} tasks"
    each = _span(score.num_samples for score in shares)
    return Suite("lm-evaluation-harness", _controls_last(rows), True, asked, f"{each} problems" if each else "")


def _harness_measure(scores: Sequence[HarnessScore]) -> Measure:
    """Mean over tasks, with the 95% interval that the tasks' standard errors give if all are known."""
    mean = sum(score.value for score in scores) / len(scores)
    errors = [score.stderr for score in scores if score.stderr is not None]
    if len(errors) < len(scores):
        return Measure(mean)
    half = Z_95 * math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return Measure(mean, max(0.0, mean - half), min(1.0, mean + half))


def main_suite(data: ReportData) -> Suite | None:
    """The suite that the first sentence and the frontier use: the first that compares models, else the first."""
    found = [suite for suite in suites(data) if any(row.overall for row in suite.rows)]
    compared = [suite for suite in found if sum(row.overall is not None for row in suite.rows) > 1]
    return next(iter(compared or found), None)


def settings(data: ReportData) -> tuple[Setting, ...]:
    """Throughput by setting; of two measurements of a model in one setting, the later counts."""
    by = grouped(data.throughput, _way)
    return tuple(
        Setting(batch, prompt, new, {speed.model: speed for speed in speeds}, serving)
        for (serving, batch, prompt, new), speeds in by.items()
    )


def _way(speed: Throughput) -> tuple[Serving | None, int | None, int, int]:
    batch_size = None if speed.serving else speed.batch_size
    return speed.serving, batch_size, speed.prompt_tokens, speed.new_tokens


def main_setting(data: ReportData) -> Setting | None:
    """The setting in which most models were measured, the first of equals; one in a server, if it compares models."""
    return max(
        settings(data),
        key=lambda setting: (setting.serving is not None and setting.compares, len(setting.speeds)),
        default=None,
    )


def frontier(data: ReportData) -> Frontier | None:
    """Quality against throughput; where none was measured, against mixer layers or the cache.

    Returns:
        None unless two models, one of them not the teacher, have a place.
    """
    suite, setting = main_suite(data), main_setting(data)
    if suite is None:
        return None
    if setting is not None and (points := _points(suite, lambda model: setting.of(model.name))):
        served = setting.serving
        where = f"; {served.scenario}, {served.device}" if served else ""
        return Frontier("throughput", setting.unit + where, points)
    note = "No throughput was measured in this run; {} stands in for it, and says nothing about speed by itself."
    if points := _points(suite, _mixers):
        total = f" of {len(data.layout)}" if data.layout else ""
        return Frontier("mixers", f"mixer layers{total}", points, note.format("the number of mixer layers"))
    cache = {memory.key: Measure(memory.kv_bytes_per_token) for memory in data.memory}
    if points := _points(suite, lambda model: cache.get(model.name)):
        return Frontier("cache", "cache, bytes per token", points, note.format("the cache that each token takes"))
    return None


def _mixers(model: Model) -> Measure | None:
    count = 0 if model.is_teacher else model.num_mixers
    return None if count is None else Measure(count)


def _points(suite: Suite, place: Callable[[Model], Measure | None]) -> tuple[FrontierPoint, ...]:
    """The models that have both; none at all if there is nothing to compare."""
    points = []
    for row in suite.rows:
        x = place(row.model)
        if x is not None and row.overall is not None:
            points.append(FrontierPoint(row.model, x.value, row.overall))
    compares = len(points) > 1 and any(not point.model.is_teacher for point in points)
    return tuple(points) if compares else ()


def ranking_groups(rankings: Sequence[Ranking]) -> dict[str, list[Ranking]]:
    """Rankings by the stage that they were made for."""
    return grouped(rankings, lambda ranking: ranking.stage)


def grouped(entries: Sequence[Entry], key: Callable[[Entry], Key]) -> dict[Key, list[Entry]]:
    """Entries by key, both in their order of appearance."""
    groups: dict[Key, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups

"""Which plots a run gets, and what they say to those who cannot see them."""

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hybridize.report import plots
from hybridize.report.data import ReportData
from hybridize.report.measures import LossCurve, Ranking, Search
from hybridize.report.numbers import listing, number, percent, short_bytes, times, token_count
from hybridize.report.plots.curves import loss_panels, memory_shown
from hybridize.report.plots.frontier import is_crowded
from hybridize.report.plots.importance import log_floor, shown_strips
from hybridize.report.plots.slope import extremes
from hybridize.report.study import (
    Frontier,
    Measure,
    Setting,
    Suite,
    arranged,
    frontier,
    grouped,
    main_setting,
    settings,
    suites,
)
from hybridize.report.summary import result_model

PLOT_NAMES = (
    "accuracy",
    "tasks",
    "frontier",
    "throughput",
    "importance",
    "before_after",
    "layers",
    "loss",
    "memory",
    "search",
)
"""File names without suffix; the accuracy and the tasks of a second suite are `accuracy-2` and `tasks-2`."""

MAX_PANELS = 12
"""Of rankings in one picture; more go to `importance-2`, `before_after-2`, and so on."""


@dataclass(frozen=True)
class Plot:
    """A drawn plot.

    Attributes:
        name: of its file beside the page, without suffix.
        png: its bytes.
        narrow_png: the same for narrow screens.
        alt: what it says to those who cannot see it.
        caption: what is seen, how many, which interval, which controls.
    """

    name: str
    png: bytes
    narrow_png: bytes
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The picture as a data URL, so that the page needs no second file."""
        return _data_url(self.png)

    @property
    def narrow_source(self) -> str:
        """The picture for narrow screens as a data URL."""
        return _data_url(self.narrow_png)


def _data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def draw_plots(data: ReportData) -> dict[str, Plot]:
    """Draw what the data allow, by file name without suffix; a section without data has no plot."""
    drawn: dict[str, Plot] = {}

    def add(name: str, draw: Callable[..., bytes], alt: str, caption: str) -> None:
        drawn[name] = Plot(name, draw(narrow=False), draw(narrow=True), alt, caption)

    model = result_model(data)
    result = model.name if model else ""
    setting, all_settings = main_setting(data), settings(data)
    all_suites = [arranged(suite, result) for suite in suites(data)]
    for index, suite in enumerate(all_suites):
        suffix = f"-{index + 1}" if index else ""
        beside = setting if index == 0 else None
        if any(row.overall for row in suite.rows):
            add(
                f"accuracy{suffix}",
                lambda narrow, suite=suite, beside=beside: plots.score_chart(suite, beside, result, narrow=narrow),
                _score_alt(suite, beside),
                _score_caption(suite, beside),
            )
        if len(suite.tasks) > 1:
            add(
                f"tasks{suffix}",
                lambda narrow, suite=suite: plots.task_chart(suite, result, narrow=narrow),
                f"Bar chart of accuracy by task. {'; '.join(map(_task_alt(suite), suite.tasks))}.",
                _task_caption(suite),
            )
    if place := frontier(data):
        add(
            "frontier",
            lambda narrow: plots.frontier_chart(place, result, len(data.layout), narrow=narrow),
            _frontier_alt(place),
            _frontier_caption(place, setting),
        )
    if all_settings and (len(all_settings) > 1 or not all_suites):
        names = dict.fromkeys(speed.model for speed in data.throughput if not speed.layout_of)
        shared = [speed for speed in data.throughput if speed.model not in names]
        stands = {speed.model: speed.layout_of for speed in shared}
        models = sorted(map(data.model, names), key=lambda entry: entry.is_control)
        add(
            "throughput",
            lambda narrow: plots.throughput_chart(models, all_settings, stands.get(result, result), narrow=narrow),
            f"Bar chart of throughput. {' '.join(_speed_alt(data, one) for one in all_settings)}",
            "Tokens generated per second over the whole batch: the median of the repeats, "
            "whiskers from the slowest to the fastest."
            + (" A bar for each layout that was measured; the table counts the others that have it." if stands else ""),
        )
    _add_rankings(data, add)
    for name, search in zip(search_plots(data).values(), data.searches, strict=True):
        add(
            name,
            lambda narrow, search=search: plots.search_chart(search, narrow=narrow),
            _search_alt(search),
            f"{search.verdict} Losses are predicted: the sum, over the layers, of what {search.method} says of each "
            f"alone. Cost: {search.cost_unit}. The ring is the layout chosen.",
        )
    curves = [curve for curve in data.losses if curve.steps]
    if curves:
        parts = [f"{c.label} from {number(c.losses[0])} to {number(c.losses[-1])} {c.unit}" for c in curves]
        add(
            "loss",
            lambda narrow: plots.loss_chart(curves, narrow=narrow),
            f"Line chart of the training loss against tokens. {'; '.join(parts)}.",
            _loss_caption(curves),
        )
    if data.memory:
        parts = [f"{model.label} {short_bytes(model.bytes_at(131072))}" for model in data.memory]
        add(
            "memory",
            lambda narrow: plots.memory_chart(data.memory, narrow=narrow),
            f"Line chart of a sequence's cache against its length. At 131072 tokens: {'; '.join(parts)}.",
            "Keys and values of the attention layers and states of the mixers, for one sequence. Both axes double "
            "from line to line."
            + (
                " Shaded: between a series' first and last, where its other models lie."
                if len(memory_shown(data.memory)) < len(data.memory)
                else ""
            ),
        )
    return drawn


def search_plots(data: ReportData) -> dict[str, str]:
    """The plot of each search, by the search's name: `search`, `search-2`, and so on."""
    return {search.name: f"search-{i + 1}" if i else "search" for i, search in enumerate(data.searches)}


def _search_alt(search: Search) -> str:
    parts = []
    for curve in search.curves:
        last = curve.points[-1]
        parts.append(f"{curve.label} up to {last.speedup:.2f} times as cheap at {number(last.loss)} {search.unit}")
    return f"Line chart of predicted loss against cost. {'; '.join(parts)}. Chosen: {search.layout}."


def _add_rankings(data: ReportData, add: Callable[[str, Callable[..., bytes], str, str], None]) -> None:
    scored = [entry for entry in data.rankings if entry.is_scored]
    has_controls = any(entry.is_control for entry in data.rankings)
    for index, part in enumerate(_parts(scored)):
        parts = [f"{entry.title} would replace {listing(entry.chosen)}" for entry in part]
        add(
            f"importance-{index + 1}" if index else "importance",
            lambda narrow, part=part: plots.importance_chart(part, narrow=narrow),
            f"Bar chart of the importance of each layer by method. {'; '.join(parts)}.",
            " ".join(_importance_caption(part)),
        )
    for index, part in enumerate(_parts([entry for entry in data.rankings if entry.slopes])):
        kept = "; ".join(map(_slope_alt, part))
        counts = sorted({len(entry.slopes) for entry in part})
        number_of = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        add(
            f"before_after-{index + 1}" if index else "before_after",
            lambda narrow, part=part: plots.slope_chart(part, narrow=narrow),
            f"Slope chart of the loss of each layer before and after training. {kept}.",
            f"One line per layer, {number_of} layers: the loss with a mixer in its place, as initialised and after "
            "training it. The two lowest, the two highest and the steepest line are labelled with the loss they end "
            "at. Thick lines are the layers chosen.",
        )
    if data.rankings:
        strips = shown_strips(data.rankings)
        parts = [f"{entry.title}: {listing(entry.chosen)}" for entry in strips]
        add(
            "layers",
            lambda narrow: plots.layer_strips(strips, narrow=narrow),
            f"Strips of replaced layers. {'; '.join(parts)}.",
            "What each ranking would replace"
            + (", controls in grey" if has_controls else "")
            + ". Where there is room, the number is the place in the order, 1 for the least important layer."
            + (" Small squares are mixers already." if any(entry.replaced for entry in strips) else "")
            + _strips_left_out(data.rankings, strips),
        )


def _parts(rankings: Sequence[Ranking]) -> list[list[Ranking]]:
    """What a picture each shows: all, or whole series as long as they are at most `MAX_PANELS`, then the others."""
    if len(rankings) <= MAX_PANELS:
        return [list(rankings)] if rankings else []
    parts: list[list[Ranking]] = []
    groups = grouped(rankings, lambda ranking: ranking.series)
    for name in sorted(groups, key=lambda name: not name):
        for start in range(0, len(groups[name]), MAX_PANELS):
            some = groups[name][start : start + MAX_PANELS]
            if not parts or not name or len(parts[-1]) + len(some) > MAX_PANELS:
                parts.append([])
            parts[-1] += some
    return parts


def _strips_left_out(rankings: Sequence[Ranking], strips: Sequence[Ranking]) -> str:
    left_out = [entry for entry in rankings if entry not in strips]
    if any(entry.chosen for entry in left_out):
        kept = "Of a series, controls stand for its first stage only, and once where they agree"
        return f" {kept}. All are in the tables below."
    return " Rankings by which nothing was replaced stand in the tables below." if left_out else ""


def _loss_caption(curves: Sequence[LossCurve]) -> str:
    caption = "Loss of each training stage against the tokens it was trained on"
    panels = [panel.curves for panel in loss_panels(curves)]
    apart = [panel for panel in panels if all(curve.is_control for curve in panel)]
    among = [panel for panel in panels if panel not in apart and any(curve.is_control for curve in panel)]
    if len(panels) == len(grouped(curves, lambda curve: (curve.kind, curve.unit))):
        return caption + (", controls in grey." if apart or among else ".")
    parts = [f"{caption}.", "Panels of one kind of loss share their axes."]
    parts += ["Controls are in panels of their own."] if apart else []
    parts += ["In grey: controls among others."] if among else []
    return " ".join(parts)


def _importance_caption(rankings: list[Ranking]) -> list[str]:
    parts = ["The taller the bar, the more the layer matters. Hatched layers are the ones that the ranking replaces."]
    if any(log_floor(entry.scores) is not None for entry in rankings):
        parts.append("Where scores differ by a factor of 50 or more, the axis is logarithmic.")
    papers = dict.fromkeys(f"{entry.method}, {entry.paper}" for entry in rankings if entry.paper)
    return [*parts, f"Methods: {'; '.join(papers)}."] if papers else parts


def _slope_alt(ranking: Ranking) -> str:
    values = {layer: (before, after) for layer, before, after in ranking.slopes}
    ends = [f"layer {at} from {number(values[at][0])} to {number(values[at][1])}" for at in extremes(ranking)]
    return f"{ranking.title}: {', '.join(ends)} {ranking.unit}"


def _score_alt(suite: Suite, setting: Setting | None) -> str:
    parts = []
    for row in suite.rows:
        speed = setting.of(row.model.name) if setting else None
        beside = f", {_speed(setting, speed)}" if setting and speed else ""
        parts.append(f"{row.model.label} {percent(row.overall.value if row.overall else None)}{beside}")
    what = "accuracy over all tasks" + (", and of throughput" if setting else "")
    return f"Bar chart of {what}. {'; '.join(parts)}."


def _speed(setting: Setting, speed: Measure) -> str:
    return f"{times(speed.value)} the speed" if setting.is_relative else f"{number(round(speed.value))} tokens/s"


def _score_caption(suite: Suite, setting: Setting | None) -> str:
    mean = "Mean accuracy" if suite.is_harness else "Accuracy"
    parts = [f"{mean} over {suite.asked}, whiskers: 95% intervals."]
    if setting and any(setting.of(row.model.name) for row in suite.rows):
        repeats = {speed.repeats for speed in setting.speeds.values()}
        of = f"{min(repeats)} repeats" if len(repeats) == 1 else f"{min(repeats)} to {max(repeats)} repeats"
        parts.append(f"Throughput: {setting}; the median of {of}, whiskers from the slowest to the fastest.")
    if any(row.model.is_control for row in suite.rows):
        parts.append("Hatched bars are controls.")
    parts += _seeds_caption(row.overall for row in suite.rows)
    return " ".join(parts)


def _task_caption(suite: Suite) -> str:
    each = f", {suite.per_task} in each" if suite.per_task else ""
    controls = " Hatched bars are controls." if any(row.model.is_control for row in suite.rows) else ""
    seeds = "".join(f" {part}" for part in _seeds_caption(row.overall for row in suite.rows))
    return (
        f"Right answers by task{each}, whiskers: 95% intervals.{controls}{seeds} The numbers stand in the table below."
    )


def _seeds_caption(measures: Iterable[Measure | None]) -> list[str]:
    several = any(measure is not None and measure.seeds for measure in measures)
    return ["A bar of several seeds is their mean, without an interval; dots are the single seeds."] if several else []


def _task_alt(suite: Suite) -> Callable[[str], str]:
    def alt(task: str) -> str:
        shares = [f"{row.model.label} {percent(row.tasks[task].value)}" for row in suite.rows if task in row.tasks]
        return f"{task}: {', '.join(shares)}"

    return alt


def _speed_alt(data: ReportData, setting: Setting) -> str:
    speeds = [(data.model(name), setting.of(name)) for name in setting.measured]
    parts = [f"{model.label} {_speed(setting, speed)}" for model, speed in speeds if speed]
    return f"{setting}: {', '.join(parts)}."


def _frontier_alt(place: Frontier) -> str:
    parts = []
    for point in place.points:
        x = {"throughput": f"{point.x:.3g}", "mixers": f"{point.x:.0f}", "cache": short_bytes(point.x)}[place.axis]
        spent = None if is_crowded(place) else point.model.cumulative_tokens
        after = f" after {token_count(spent)}" if spent else ""
        parts.append(f"{point.model.label} {percent(point.quality.value)} at {x}{after}")
    series = list(dict.fromkeys(point.model.series for point in place.points if point.model.series))
    lines = f" Lines: {', '.join(series)}." if is_crowded(place) and series else ""
    return f"Scatter chart of accuracy against {place.label}.{lines} {'; '.join(parts)}."


def _frontier_caption(place: Frontier, setting: Setting | None) -> str:
    seen = "Up and to the left is better" if place.axis == "cache" else "Up and to the right is better"
    parts = [f"{seen}. Vertical lines: 95% intervals{', of labelled models only' if is_crowded(place) else ''}."]
    if not is_crowded(place) and any(point.model.cumulative_tokens for point in place.points):
        parts.append("Tokens are those spent on a model so far, all its stages together.")
    if any(point.model.is_teacher for point in place.points):
        parts.append("The dotted line is the teacher's accuracy.")
    parts.append("The thin line joins the models that no other beats in both.")
    if any(point.model.is_control for point in place.points):
        parts.append("Crosses are controls.")
    if is_crowded(place):
        if any(point.model.series for point in place.points):
            numbers = "" if place.axis == "mixers" else "; numbers at it count its mixer layers"
            parts.append(f"A line with marks is a series{numbers}.")
        parts.append("Points that would cover one another stand a little aside. All numbers are in the table below.")
    if place.axis == "throughput" and setting:
        parts.append(f"Throughput: {setting}.")
    return " ".join(parts)

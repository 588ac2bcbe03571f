"""Gather a run's artifacts into what the report shows."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hybridize.importance import METHODS, load_ranking, load_search
from hybridize.pipeline.artifacts import Artifact, library_versions
from hybridize.pipeline.searches import measured_losses, show_search
from hybridize.pipeline.speeds import collect_speeds
from hybridize.pipeline.stages import METRICS_FILE, RANKING_FILE, SEARCH_FILE
from hybridize.pipeline.stages.training import loss_of
from hybridize.report import (
    CacheMemory,
    Evaluation,
    HarnessScore,
    LossCurve,
    Merge,
    Model,
    Ranking,
    ReportData,
    Score,
    Search,
    StageCost,
    TextScore,
    TokenSpend,
    Traces,
)
from hybridize.spec.expansion import expand
from hybridize.spec.recipe import RecipeSpec
from hybridize.spec.stages import (
    MODEL_KINDS,
    TEACHER,
    ConvertStage,
    DistillStage,
    EvaluateStage,
    FitStage,
    HarnessStage,
    JudgingStage,
    MergeStage,
    OnPolicyStage,
    RankStage,
    ScheduleStage,
    SearchStage,
    SftStage,
    StageSpec,
    TextStage,
    TracesStage,
    TrainStage,
    distilled_name,
)

_LOSSES: dict[type[TrainStage], tuple[str, str]] = {
    DistillStage: ("distillation", "nat/token"),
    OnPolicyStage: ("on-policy distillation", "nat/token"),
    SftStage: ("SFT", "nat/token"),
    FitStage: ("fit", "of the output's mean square"),
}
"""What a stage's loss is, and its unit."""

_POINTS = {
    "convert": "converted",
    "fit": "fitted",
    "distill": "distilled",
    "on_policy": "distilled on-policy",
    "sft": "fine-tuned",
    "merge": "merged",
}
"""What a model is by the kind of stage that made it."""


def collect(
    written: RecipeSpec,
    num_layers: int,
    artifacts: Mapping[str, Artifact],
    title: str | None = None,
    stale: Mapping[str, str] | None = None,
    run: Path | None = None,
) -> ReportData:
    """Everything that finished stages have to tell, and what was measured in vLLM.

    Args:
        written: the recipe as its author wrote it.
        num_layers: of the teacher.
        artifacts: finished stages by name.
        title: of the report.
        stale: what the next run would do anew, and why, by stage.
        run: the folder, for its `serving.jsonl`; None: it is not looked for.
    """
    recipe = expand(written, num_layers)
    study = _Study(recipe, num_layers, artifacts, stale or {}, series_of(written, num_layers))
    speeds, notes = collect_speeds(recipe, num_layers, artifacts, run)
    return replace(study.data(written, title), throughput=tuple(speeds), throughput_notes=notes)


def series_of(written: RecipeSpec, num_layers: int) -> dict[str, str]:
    """What each schedule is called, its label or else its name, by the stages that it stands for."""
    schedules = [stage for stage in written.stages if isinstance(stage, ScheduleStage)]
    labels = [schedule.label for schedule in schedules]
    series: dict[str, str] = {}
    for schedule in schedules:
        called = schedule.label if labels.count(schedule.label) == 1 else ""
        for count in schedule.counts(num_layers):
            names = [f"{schedule.name}-{count}-{kind}" for kind in ("rank", "convert", "fit")]
            series |= dict.fromkeys([*names, distilled_name(schedule, count)], called or schedule.name)
    return series


class _Study:
    """A run: its stages that have finished, and how they descend from one another."""

    def __init__(
        self,
        recipe: RecipeSpec,
        num_layers: int,
        artifacts: Mapping[str, Artifact],
        stale: Mapping[str, str],
        series: Mapping[str, str],
    ) -> None:
        self.recipe, self.num_layers, self.artifacts, self.stale = recipe, num_layers, artifacts, stale
        self.series = series
        self.stages: dict[str, Any] = {stage.name: stage for stage in recipe.stages}

    def data(self, written: RecipeSpec, title: str | None) -> ReportData:
        """The whole."""
        converts = list(self._done(ConvertStage))
        result = self._result()
        layout = self._layout(result or (converts[0].name if converts else TEACHER))
        return ReportData(
            title=title or written.name,
            created=max((str(a.manifest["created"]) for a in self.artifacts.values()), default=""),
            teacher=Path(written.teacher).name,
            layout=layout,
            recipe=yaml.safe_dump(written.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
            versions=library_versions(),
            rankings=tuple(self._rankings()),
            losses=tuple(self._losses()),
            evaluations=tuple(self._evaluations()),
            memory=tuple(self._memory(converts)),
            costs=tuple(self._costs()),
            models=tuple(self._models()),
            harness=tuple(self._harness()),
            texts=tuple(self._texts()),
            traces=tuple(self._traces()),
            merges=tuple(self._merges()),
            searches=tuple(self._searches()),
            result=result,
            stale=self.stale,
        )

    def _done(self, *kinds: type[StageSpec]) -> Iterator[Any]:
        """Finished stages of some kinds, in order."""
        return (s for s in self.recipe.stages if isinstance(s, kinds) and s.name in self.artifacts)

    def _result(self) -> str:
        """The model that the report is about: the last one judged, of those that a method made and trained."""
        judged = [s.model for s in self._done(EvaluateStage, HarnessStage) if not s.control and s.model != TEACHER]
        return next((m for m in reversed(judged) if not isinstance(self.stages[m], ConvertStage)), "")

    def _converted(self, model: str) -> list[Any]:
        """The conversions on a model's way from the teacher; of a merge's sources, whose layouts agree, the first's."""
        if model == TEACHER:
            return []
        stage = self.stages[model]
        parents = self._converted(stage.sources[0] if isinstance(stage, MergeStage) else stage.model)
        return [*parents, stage] if isinstance(stage, ConvertStage) else parents

    def _layout(self, model: str) -> tuple[str, ...]:
        converts = [stage for stage in self._converted(model) if stage.name in self.artifacts]
        if not converts:
            return ("attention",) * self.num_layers
        return tuple(self.artifacts[converts[-1].name].metrics["layout"])

    def _label(self, model: str) -> str:
        labels = [s.label for s in self._done(JudgingStage) if s.model == model and s.label]
        return labels[0] if labels else model

    def _is_control(self, model: str) -> bool:
        return any(s.control for s in self._done(JudgingStage) if s.model == model)

    def _models(self) -> Iterator[Model]:
        """The teacher and every model of which something was measured, with what was spent on it."""
        yield Model(TEACHER, self._label(TEACHER), 0)
        measured = {stage.model for stage in self._done(JudgingStage)}
        for stage in self._done(StageSpec):
            if stage.kind in MODEL_KINDS and stage.name in measured:
                spent = tuple(TokenSpend(name, tokens) for name, tokens in self._spent(stage.name).items())
                mixers = sum(mixer != "attention" for mixer in self._layout(stage.name))
                control, series = self._is_control(stage.name), self.series.get(stage.name, "")
                yield Model(stage.name, self._label(stage.name), mixers, spent, control, series)

    def _spent(self, model: str) -> dict[str, int]:
        """Tokens trained on by each stage on a model's way from the teacher; a common trunk counts once."""
        if model == TEACHER or model not in self.artifacts:
            return {}
        stage = self.stages[model]
        spent: dict[str, int] = {}
        for parent in stage.models:
            spent |= self._spent(parent)
        tokens = self.artifacts[model].metrics.get("tokens")
        return spent | ({model: int(tokens)} if tokens else {})

    def _rankings(self) -> list[Ranking]:
        """Each ranking with what it chose; the controls that every ranking carries come after those of its stage."""
        found: list[Ranking] = []
        stages, details = list(self._done(RankStage)), self._ranking_details()
        counts = {stage.name: self._ranking_count(stage.name) for stage in stages}
        replaced = {
            stage.name: [i for i, mixer in enumerate(self._layout(stage.model)) if mixer != "attention"]
            for stage in stages
        }
        totals = {name: len(replaced[name]) + count for name, count in counts.items() if count}
        alone = {total for name, total in totals.items() if name not in self.series}
        named = len(set(self.series.values())) > 1 or any(totals.get(name) in alone for name in self.series)
        groups = {name: f"{total} of {self.num_layers} layers" for name, total in totals.items()}
        if named:
            groups |= {name: f"{self.series[name]}, {group}" for name, group in groups.items() if name in self.series}
        known = {(groups.get(stage.name, ""), stage.method) for stage in stages}
        for stage in stages:
            name, series = stage.name, self.series.get(stage.name, "")
            ranking = load_ranking(self.artifacts[name].folder / RANKING_FILE)
            group = groups.get(name, "")
            shown = partial(self._shown, ranking=ranking, count=counts[name], group=group, replaced=replaced[name])
            method = shown(ranking, stage=stage)
            found.append(replace(method, series=series, detail=details.get(name, "")))
            carried = {rule: control for rule, control in ranking.controls.items() if (group, rule) not in known}
            known |= {(group, rule) for rule in carried}
            found += [replace(shown(control, stage=None), series=series) for control in carried.values()]
        return found

    def _ranking_count(self, ranking: str) -> int | None:
        """How many layers the first conversion by it replaced; None if there is none."""
        return next((s.num_layers for s in self._done(ConvertStage) if s.ranking == ranking), None)

    def _ranking_details(self) -> dict[str, str]:
        """Of rankings outside of series, what tells apart those by one method: mixer and init, or else the name."""
        details: dict[str, str] = {}
        alone = [s for s in self._done(RankStage) if s.name not in self.series and not METHODS[s.method].is_control]
        for method in {stage.method for stage in alone}:
            alike = [stage for stage in alone if stage.method == method]
            facts = [(str(stage.mixer.type).replace("_", " "), str(stage.init)) for stage in alike]
            differ = [index for index, values in enumerate(zip(*facts, strict=True)) if len(set(values)) > 1]
            texts = [", ".join(fact[index] for index in differ) for fact in facts]
            if len(set(texts)) < len(alike) > 1:
                texts = [stage.name for stage in alike]
            details |= dict(zip([stage.name for stage in alike], texts, strict=True))
        return details

    def _shown(
        self, rule: Any, ranking: Any, count: int | None, group: str, replaced: list[int], stage: RankStage | None
    ) -> Ranking:
        """One rule's choice, with its scores if it is the ranking itself and no control that came with it."""
        scores = (rule.scores or {}) if rule is ranking else {}
        before = (rule.before or {}) if rule is ranking else {}
        method = METHODS[rule.method]
        layers = range(ranking.num_layers)
        return Ranking(
            method=rule.method,
            scores=tuple(scores.get(layer) for layer in layers),
            order=tuple(rule.order or ()),
            chosen=rule.choose(count) if count else (),
            unit=(ranking.unit if rule is ranking else method.unit) or "nat/token",
            is_control=method.is_control,
            before=tuple(before.get(layer) for layer in layers) if before else (),
            steps=stage.steps if stage is not None and before else None,
            stage=group,
            paper=method.paper,
            replaced=tuple(replaced),
        )

    def _losses(self) -> Iterator[LossCurve]:
        for stage in self._done(TrainStage):
            lines = (self.artifacts[stage.name].folder / METRICS_FILE).read_text().splitlines()
            records = [json.loads(line) for line in lines]
            kind, unit = _LOSSES[type(stage)]
            yield LossCurve(
                name=stage.name,
                label=self._label(stage.name),
                steps=tuple(record["step"] for record in records),
                losses=tuple(loss_of(record) for record in records),
                tokens=tuple(record["tokens"] for record in records),
                is_control=self._is_control(stage.name),
                unit=unit,
                kind=kind,
                series=self.series.get(stage.name, ""),
            )

    def _evaluations(self) -> Iterator[Evaluation]:
        for stage in sorted(self._done(EvaluateStage), key=lambda s: s.model != TEACHER):
            metrics = self.artifacts[stage.name].metrics
            point = stage.model if stage.model == TEACHER else self._point(self.stages[stage.model])
            how = f"{stage.samples} samples at temperature {stage.temperature:g}" if stage.temperature else "greedy"
            yield Evaluation(
                point=point,
                label=stage.label or self._label(stage.model),
                overall=_score(metrics["overall"]),
                tasks={name: _score(score) for name, score in metrics["tasks"].items()},
                steps_correct=metrics["overall"]["steps_correct"],
                is_control=stage.control,
                model=stage.model,
                suite=f"{stage.difficulty}, {how}, {stage.problems_per_task} problems of each task",
                pass_at={int(k): value["accuracy"] for k, value in metrics.get("pass_at", {}).items()},
            )

    def _point(self, stage: Any) -> str:
        """What a model is in the study: `converted`, `distilled`, `random init: distilled`, `uniform layers: ...`."""
        converts = self._converted(stage.name)
        word = _POINTS[stage.kind]
        if not converts:
            return f"unconverted: {stage.name}"
        origin = converts[-1]
        if origin.init == "random":
            return f"random init: {word}"
        ranking = self.stages.get(origin.ranking) if origin.ranking else None
        if isinstance(ranking, RankStage) and METHODS[ranking.method].is_control:
            return f"{ranking.method} layers: {word}"
        starts = {stage.init for stage in self.stages.values() if isinstance(stage, ConvertStage)} - {"random"}
        is_usual = len(starts) == 1 or origin.init == ConvertStage.model_fields["init"].default
        return word if is_usual else f"{origin.init} init: {word}"

    def _memory(self, converts: list[Any]) -> Iterator[CacheMemory]:
        """The teacher's cache, and that of each number of replaced layers."""
        seen: set[tuple[int, int]] = set()
        for convert in converts:
            series = self.series.get(convert.name, "")
            memory = self.artifacts[convert.name].metrics["memory"]
            for key, label, model in (("teacher", "teacher", TEACHER), ("hybrid", self._size_label(convert), "")):
                size = memory[key]
                if (size["kv_per_token"], size["state"]) not in seen:
                    seen.add((size["kv_per_token"], size["state"]))
                    mine = "" if model else series
                    named = model or self._shown_as(convert)
                    yield CacheMemory(label, size["kv_per_token"], size["state"], named, mine)

    def _shown_as(self, convert: ConvertStage) -> str:
        """The model under which a conversion's cache is shown: the one that the report is about, if it has that."""
        result = self._result()
        converts = self._converted(result) if result else []
        return result if converts and converts[-1].name == convert.name else convert.name

    def _size_label(self, convert: ConvertStage) -> str:
        several = len(set(self.series.values())) > 1
        series = f"{self.series[convert.name]}, " if several and convert.name in self.series else ""
        mixers = sum(mixer != "attention" for mixer in self._layout(convert.name))
        return f"{series}{mixers} of {self.num_layers} replaced"

    def _harness(self) -> Iterator[HarnessScore]:
        for stage in self._done(HarnessStage):
            for task, entry in self.artifacts[stage.name].metrics["tasks"].items():
                share = "perplexity" not in entry["metric"] and "bits_per_byte" not in entry["metric"]
                yield HarnessScore(
                    stage.model,
                    task,
                    entry["metric"],
                    entry["value"],
                    entry["stderr"],
                    entry["num_samples"],
                    is_share=share,
                )

    def _texts(self) -> Iterator[TextScore]:
        for stage in self._done(TextStage):
            metrics = self.artifacts[stage.name].metrics
            yield TextScore(
                stage.model,
                Path(stage.text).name,
                metrics["tokens"],
                metrics["nats_per_token"],
                metrics["perplexity"],
                metrics.get("kl_nats"),
            )

    def _traces(self) -> Iterator[Traces]:
        for stage in self._done(TracesStage):
            metrics = self.artifacts[stage.name].metrics
            yield Traces(
                stage.name,
                stage.model,
                metrics["prompts"],
                stage.samples_per_prompt,
                metrics["samples"],
                metrics["verified"],
                metrics["verified_tokens"],
                metrics["verifier"],
            )

    def _merges(self) -> Iterator[Merge]:
        for stage in self._done(MergeStage):
            weights = stage.weights or (1.0,) * len(stage.sources)
            yield Merge(
                stage.name,
                stage.method,
                stage.sources,
                tuple(weight / sum(weights) for weight in weights),
                stage.base or "",
                stage.density if stage.method == "ties" else None,
            )

    def _searches(self) -> Iterator[Search]:
        for stage in self._done(SearchStage):
            distilled = [s.name for s in self._done(DistillStage) if self._converted(s.name)[-1].search == stage.name]
            result = load_search(self.artifacts[stage.name].folder / SEARCH_FILE)
            yield show_search(stage.name, result, measured_losses(distilled, self.artifacts))

    def _costs(self) -> Iterator[StageCost]:
        for name, artifact in self.artifacts.items():
            metrics = artifact.metrics
            tokens = metrics.get("tokens") or metrics.get("cost", {}).get("tokens")
            trained, status = metrics.get("num_trainable_parameters"), "stale" if name in self.stale else "done"
            yield StageCost(name, artifact.manifest["seconds"], tokens, trained, status)


def _score(score: Mapping[str, Any]) -> Score:
    return Score(score["correct"], score["total"], score["accuracy"], score["low"], score["high"])

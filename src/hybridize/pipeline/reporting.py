"""Gather a run's artifacts into what the report shows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hybridize.importance import load_ranking
from hybridize.pipeline.artifacts import MANIFEST, Artifact, library_versions, read_artifact
from hybridize.pipeline.stages import METRICS_FILE, RANKING_FILE
from hybridize.report import (
    CacheMemory,
    Evaluation,
    LossCurve,
    Ranking,
    ReportData,
    Score,
    StageCost,
    write_report,
)
from hybridize.spec.recipe import RecipeSpec, parse_recipe
from hybridize.spec.stages import TEACHER, ConvertStage, DistillStage, EvaluateStage, RankStage


def collect(recipe: RecipeSpec, artifacts: Mapping[str, Artifact], title: str | None = None) -> ReportData:
    """Everything that finished stages have to tell."""
    convert = next((s for s in recipe.stages if isinstance(s, ConvertStage) and s.name in artifacts), None)
    layout = artifacts[convert.name].metrics["layout"] if convert else []
    created = max((str(a.manifest["created"]) for a in artifacts.values()), default="")
    return ReportData(
        title=title or recipe.name,
        created=created,
        teacher=Path(recipe.teacher).name,
        layout=tuple(layout),
        recipe=yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
        versions=library_versions(),
        rankings=tuple(_rankings(recipe, artifacts, len(layout))),
        losses=tuple(_losses(recipe, artifacts)),
        evaluations=tuple(_evaluations(recipe, artifacts)),
        memory=tuple(_memory(artifacts[convert.name].metrics["memory"])) if convert else (),
        costs=tuple(_costs(artifacts)),
    )


def write(folder: Path, data: ReportData) -> Path:
    """Write the page and its pictures."""
    return write_report(folder, data)


def rewrite_report(run: Path) -> Path:
    """Write the report of a run folder anew, from whatever stages have finished.

    Raises:
        ValueError: the folder holds no run.
    """
    file = run / "recipe.json"
    if not file.is_file():
        raise ValueError(f"{run}: it holds no recipe.json, so it is no run; give the output folder of `hybridize run`")
    recipe = parse_recipe(json.loads(file.read_text()))
    artifacts = {}
    for stage in recipe.stages:
        artifact = read_artifact(run / stage.name) if (run / stage.name / MANIFEST).is_file() else None
        if artifact is not None and artifact.manifest["kind"] != "report":
            artifacts[stage.name] = artifact
    return write(run / "report", collect(recipe, artifacts))


def _rankings(recipe: RecipeSpec, artifacts: Mapping[str, Artifact], num_layers: int) -> list[Ranking]:
    """Each ranking with what it chose; the controls that every ranking carries come after."""
    found: list[Ranking] = []
    controls: dict[str, Ranking] = {}
    for stage in recipe.stages:
        if not isinstance(stage, RankStage) or stage.name not in artifacts:
            continue
        ranking = load_ranking(artifacts[stage.name].folder / RANKING_FILE)
        users = [
            s for s in recipe.stages if isinstance(s, ConvertStage) and s.ranking == stage.name and s.name in artifacts
        ]
        count = users[0].num_layers if users else None
        scores = ranking.scores or {}

        def shown(rule: Any, is_control: bool, scores: Mapping[int, float], count: int | None = count) -> Ranking:
            return Ranking(
                method=rule.method,
                scores=tuple(scores.get(layer) for layer in range(num_layers)),
                order=tuple(rule.order or ()),
                chosen=rule.choose(count) if count else (),
                is_control=is_control,
            )

        found.append(shown(ranking, stage.method != "mmr", scores))
        controls |= {name: shown(control, True, {}) for name, control in ranking.controls.items()}
    named = {ranking.method for ranking in found}
    return found + [control for name, control in controls.items() if name not in named]


def _losses(recipe: RecipeSpec, artifacts: Mapping[str, Artifact]) -> list[LossCurve]:
    curves = []
    for stage in recipe.stages:
        if isinstance(stage, DistillStage) and stage.name in artifacts:
            lines = (artifacts[stage.name].folder / METRICS_FILE).read_text().splitlines()
            records = [json.loads(line) for line in lines]
            judged = _judging(recipe, stage.name)
            curves.append(
                LossCurve(
                    name=stage.name,
                    label=(judged.label if judged and judged.label else stage.name),
                    steps=tuple(record["step"] for record in records),
                    losses_nats=tuple(record["loss_nats"] for record in records),
                    tokens=tuple(record["tokens"] for record in records),
                    is_control=bool(judged and judged.control),
                )
            )
    return curves


def _judging(recipe: RecipeSpec, model: str) -> EvaluateStage | None:
    return next((s for s in recipe.stages if isinstance(s, EvaluateStage) and s.model == model), None)


def _evaluations(recipe: RecipeSpec, artifacts: Mapping[str, Artifact]) -> list[Evaluation]:
    kinds = {stage.name: stage for stage in recipe.stages}
    found = []
    for stage in recipe.stages:
        if isinstance(stage, EvaluateStage) and stage.name in artifacts:
            metrics = artifacts[stage.name].metrics
            point = stage.model if stage.model == TEACHER else _point(kinds[stage.model], kinds)
            found.append(
                Evaluation(
                    point=point,
                    label=stage.label or point,
                    overall=_score(metrics["overall"]),
                    tasks={name: _score(score) for name, score in metrics["tasks"].items()},
                    steps_correct=metrics["overall"]["steps_correct"],
                    is_control=stage.control,
                )
            )
    return found


def _point(stage: Any, stages: Mapping[str, Any]) -> str:
    """What a model is in the study: `converted`, `distilled`, `random init: distilled`, `uniform: distilled`."""
    origin = stage
    while isinstance(origin, DistillStage):
        origin = stages[origin.model]
    word = "distilled" if isinstance(stage, DistillStage) else "converted"
    if origin.init == "random":
        return f"random init: {word}"
    ranking = stages.get(origin.ranking) if origin.ranking else None
    if isinstance(ranking, RankStage) and ranking.method != "mmr":
        return f"{ranking.method} layers: {word}"
    return word if origin.init == "aligned" else f"{origin.init} init: {word}"


def _score(score: Mapping[str, Any]) -> Score:
    return Score(score["correct"], score["total"], score["accuracy"], score["low"], score["high"])


def _memory(memory: Mapping[str, Mapping[str, int]]) -> list[CacheMemory]:
    return [CacheMemory(name, size["kv_per_token"], size["state"]) for name, size in memory.items()]


def _costs(artifacts: Mapping[str, Artifact]) -> list[StageCost]:
    costs = []
    for name, artifact in artifacts.items():
        metrics = artifact.metrics
        tokens = metrics.get("tokens") or metrics.get("num_tokens") or metrics.get("cost", {}).get("tokens")
        costs.append(StageCost(name, artifact.manifest["seconds"], tokens, metrics.get("num_trainable_parameters")))
    return costs

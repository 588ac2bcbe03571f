"""Gather a run's artifacts into what the report shows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hybridize.importance import load_ranking
from hybridize.pipeline.artifacts import Artifact, digest_of, library_versions, make_artifact, read_artifact
from hybridize.pipeline.stages import METRICS_FILE, RANKING_FILE, spec_for_key
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
from hybridize.spec.expansion import expand
from hybridize.spec.recipe import RecipeSpec, parse_recipe
from hybridize.spec.stages import (
    TEACHER,
    ConvertStage,
    DistillStage,
    EvaluateStage,
    RankStage,
    ReportStage,
    StageSpec,
)


def collect(
    written: RecipeSpec, num_layers: int, artifacts: Mapping[str, Artifact], title: str | None = None
) -> ReportData:
    """Everything that finished stages have to tell.

    Args:
        written: the recipe as its author wrote it.
        num_layers: of the teacher.
        artifacts: finished stages by name.
        title: of the report.
    """
    recipe = expand(written, num_layers)
    convert = next((s for s in recipe.stages if isinstance(s, ConvertStage) and s.name in artifacts), None)
    rankings = _rankings(recipe, artifacts)
    untouched = ["attention"] * (len(rankings[0].scores) if rankings else 0)
    layout = artifacts[convert.name].metrics["layout"] if convert else untouched
    created = max((str(a.manifest["created"]) for a in artifacts.values()), default="")
    return ReportData(
        title=title or recipe.name,
        created=created,
        teacher=Path(recipe.teacher).name,
        layout=tuple(layout),
        recipe=yaml.safe_dump(written.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
        versions=library_versions(),
        rankings=tuple(rankings),
        losses=tuple(_losses(recipe, artifacts)),
        evaluations=tuple(_evaluations(recipe, artifacts)),
        memory=tuple(_memory(artifacts[convert.name].metrics["memory"])) if convert else (),
        costs=tuple(_costs(artifacts)),
    )


def make_report(
    stage: ReportStage,
    written: RecipeSpec,
    num_layers: int,
    artifacts: Mapping[str, Artifact],
    output: Path,
    *,
    anew: bool = False,
) -> Artifact:
    """Write the page and its pictures into a folder of the run, unless they stand.

    Args:
        stage: gives the folder's name and the title.
        written: the whole job, as its author wrote it.
        num_layers: of the teacher.
        artifacts: finished stages by name.
        output: the run's folder.
        anew: write them even if they stand.
    """
    inputs = {name: artifact.digest for name, artifact in artifacts.items()}
    key = digest_of({"kind": "report", "recipe": written.model_dump(mode="json"), "inputs": inputs})
    folder = output / stage.name
    standing = None if anew else read_artifact(folder, key)
    if standing is not None:
        return standing
    return make_artifact(
        folder,
        kind="report",
        key=key,
        spec=stage.model_dump(mode="json"),
        inputs=inputs,
        work=lambda partial: {"page": write_report(partial, collect(written, num_layers, artifacts, stage.title)).name},
        replace=True,
    )


def rewrite_report(run: Path) -> Path:
    """Write the report of a run folder anew, from whatever stages have finished.

    A stage's folder that was made from other settings than those of the recipe last run, or from results that were
    replaced since, is left out.

    Raises:
        ValueError: the folder holds no run, or a result in it is damaged.
    """
    file = run / "recipe.json"
    if not file.is_file():
        raise ValueError(f"{run}: it holds no recipe.json, so it is no run; give the output folder of `hybridize run`")
    try:
        facts = json.loads(file.read_text())
        written, num_layers = parse_recipe(facts["recipe"]), int(facts["num_layers"])
        recipe = expand(written, num_layers)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: it is damaged ({error}); run the recipe again") from None
    artifacts: dict[str, Artifact] = {}
    for stage in recipe.stages:
        artifact = read_artifact(run / stage.name)
        if artifact is not None and not isinstance(stage, ReportStage) and _is_of(stage, artifact, artifacts):
            artifacts[stage.name] = artifact
    free = "report" if all(stage.name != "report" for stage in recipe.stages) else "report-page"
    report = next((stage for stage in recipe.stages if isinstance(stage, ReportStage)), ReportStage(name=free))
    made = make_report(report, written, num_layers, artifacts, run, anew=True)
    return made.folder / made.metrics["page"]


def _is_of(stage: StageSpec, artifact: Artifact, artifacts: Mapping[str, Artifact]) -> bool:
    """Whether an artifact is what a stage makes from the artifacts that there are."""
    spec, inputs = artifact.manifest["spec"], artifact.manifest["inputs"]
    return all(spec.get(name) == value for name, value in spec_for_key(stage).items()) and all(
        name in artifacts and inputs.get(name) == artifacts[name].digest for name in stage.inputs
    )


def _rankings(recipe: RecipeSpec, artifacts: Mapping[str, Artifact]) -> list[Ranking]:
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

        def shown(
            rule: Any,
            is_control: bool,
            scores: Mapping[int, float],
            count: int | None = count,
            num_layers: int = ranking.num_layers,
        ) -> Ranking:
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

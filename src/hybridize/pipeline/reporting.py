"""Write the report of a run, during it or from what it left behind."""

import json
from collections.abc import Mapping
from pathlib import Path

from hybridize.pipeline.artifacts import Artifact, digest_of, make_artifact, read_artifact
from hybridize.pipeline.collecting import collect
from hybridize.pipeline.stages import spec_for_key
from hybridize.report import write_report
from hybridize.spec.expansion import expand
from hybridize.spec.recipe import RecipeSpec, parse_recipe
from hybridize.spec.stages import ReportStage, StageSpec


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

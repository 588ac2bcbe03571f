"""Write the report of a run, during it or from what it left behind."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from hybridize.bench.serving_records import SERVING_FILE
from hybridize.pipeline.artifacts import (
    Artifact,
    digest_of,
    fingerprint_file,
    fingerprint_model,
    make_artifact,
    read_artifact,
)
from hybridize.pipeline.collecting import collect
from hybridize.pipeline.runner import outside_inputs
from hybridize.pipeline.served import read_run
from hybridize.pipeline.stages import spec_for_key
from hybridize.report import write_report
from hybridize.spec.expansion import expand
from hybridize.spec.recipe import RecipeSpec
from hybridize.spec.stages import ReportStage, StageSpec


def make_report(
    stage: ReportStage,
    written: RecipeSpec,
    num_layers: int,
    artifacts: Mapping[str, Artifact],
    output: Path,
    *,
    anew: bool = False,
    stale: Mapping[str, str] | None = None,
) -> Artifact:
    """Write the page and its pictures into a folder of the run, unless they stand, made from the same.

    Args:
        stage: gives the folder's name and the title.
        written: the whole job, as its author wrote it.
        num_layers: of the teacher.
        artifacts: finished stages by name.
        output: the run's folder.
        anew: write them even if they stand.
        stale: what the next run would do anew, and why, by stage.
    """
    inputs = {name: artifact.digest for name, artifact in artifacts.items()}
    if (output / SERVING_FILE).is_file():
        inputs[SERVING_FILE] = fingerprint_file(output / SERVING_FILE)
    facts = {"kind": "report", "recipe": written.model_dump(mode="json"), "inputs": inputs}
    key = digest_of(facts | ({"stale": dict(stale)} if stale else {}))
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
        work=lambda partial: {
            "page": write_report(partial, collect(written, num_layers, artifacts, stage.title, stale, output)).name
        },
        replace=True,
    )


def rewrite_report(run: Path) -> Path:
    """Write the report of a run folder anew, from whatever stages have finished.

    A stage's folder that was made from other settings than those of the recipe last run, or from results that were
    replaced since, is left out. One whose data, teacher or other files changed since it ran is shown, and called stale,
    and so is what was made from it; what is no longer there is not compared. Weights need not be there.

    Raises:
        ValueError: the folder holds no run, or a result in it is damaged.
    """
    written, num_layers = read_run(run)
    recipe = expand(written, num_layers)
    artifacts: dict[str, Artifact] = {}
    stale: dict[str, str] = {}
    teacher_print = _known_fingerprint(recipe.teacher)
    for stage in recipe.stages:
        artifact = read_artifact(run / stage.name, may_lack=".safetensors")
        if artifact is not None and not isinstance(stage, ReportStage) and _is_of(stage, artifact, artifacts):
            artifacts[stage.name] = artifact
            changes = [
                *_changes(stage, artifact, recipe, teacher_print),
                *(f"made from {name}" for name in stage.inputs if name in stale),
            ]
            if changes:
                stale[stage.name] = ", ".join(changes)
    free = "report" if all(stage.name != "report" for stage in recipe.stages) else "report-page"
    report = next((stage for stage in recipe.stages if isinstance(stage, ReportStage)), ReportStage(name=free))
    made = make_report(report, written, num_layers, artifacts, run, anew=True, stale=stale)
    return made.folder / made.metrics["page"]


def _known_fingerprint(teacher: str) -> str | None:
    """What identifies the teacher; None if its folder, or the revision of its name on the hub, is not at hand."""
    try:
        found = fingerprint_model(teacher)
    except ValueError:  # a path that is no name on the hub either
        return None
    return None if found.endswith("@") else found


def _changes(stage: StageSpec, artifact: Artifact, recipe: RecipeSpec, teacher_print: str | None) -> Iterator[str]:
    """What a stage read that is another thing now, in words."""
    before = artifact.manifest["inputs"]
    if teacher_print not in (None, before["teacher"]):
        yield "the teacher changed"
    for name, fingerprint in outside_inputs(stage, recipe.data).items():
        with suppress(ValueError):
            if fingerprint() != before.get(name):
                yield f"its {name} changed"


def _is_of(stage: StageSpec, artifact: Artifact, artifacts: Mapping[str, Artifact]) -> bool:
    """Whether an artifact is what a stage makes from the artifacts that there are."""
    spec, inputs = artifact.manifest["spec"], artifact.manifest["inputs"]
    return all(spec.get(name) == value for name, value in spec_for_key(stage).items()) and all(
        name in artifacts and inputs.get(name) == artifacts[name].digest for name in stage.inputs
    )

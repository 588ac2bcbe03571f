"""Run a recipe: stage by stage, skipping what stands, going on where a killed run stopped."""

import json
from pathlib import Path
from typing import Any

from hybridize.files import write_whole
from hybridize.pipeline.artifacts import (
    Artifact,
    check_target,
    digest_of,
    fingerprint_file,
    fingerprint_model,
    make_artifact,
    read_artifact,
    writing,
)
from hybridize.pipeline.planning import read_teacher_config
from hybridize.pipeline.progress import Reporter, quiet_libraries
from hybridize.pipeline.stages import READS_DATA, RUNNERS, SCRATCH, Job, spec_for_key
from hybridize.spec.data import WORLD_VERSION, DataSpec, FileDataSpec
from hybridize.spec.layout import check_layers
from hybridize.spec.recipe import RecipeSpec
from hybridize.spec.stages import ConvertStage, EvaluateStage, ReportStage, StageSpec

RECIPE_FILE = "recipe.json"


def run_recipe(recipe: RecipeSpec, reporter: Reporter | None = None) -> dict[str, Artifact]:
    """Run all stages of a recipe into its output folder.

    A stage whose result stands, made from the same spec, data, teacher and inputs, is skipped.

    Returns:
        The finished stages by name.

    Raises:
        ValueError: the recipe does not fit the teacher, an input is malformed, or an artifact was damaged.
    """
    reporter = reporter or Reporter()
    check_against_teacher(recipe)
    output = recipe.output_folder
    for stage in recipe.stages:
        check_target(output / stage.name, replace=True)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / RECIPE_FILE, json.dumps(recipe.model_dump(mode="json"), indent=1))
    job = Job(recipe.teacher, recipe.data, reporter)
    teacher_print, data_print = fingerprint_model(recipe.teacher), fingerprint_data(recipe.data)
    for number, stage in enumerate(recipe.stages, 1):
        reporter.say(f"[bold]{number}/{len(recipe.stages)} {stage.name}[/bold]  {describe(stage)}")
        if isinstance(stage, ReportStage):
            from hybridize.pipeline.reporting import make_report

            artifact = make_report(stage, recipe, job.artifacts, output)
        else:
            artifact = run_stage(stage, job, output / stage.name, teacher_print, data_print, replace=True)
        job.artifacts[stage.name] = artifact
        reporter.say(f"  {outcome(stage, artifact)}")
    return job.artifacts


def run_stage(
    stage: StageSpec, job: Job, folder: Path, teacher_print: str, data_print: str, *, replace: bool = False
) -> Artifact:
    """Run one stage, unless its result stands."""
    kind = getattr(stage, "kind")  # noqa: B009 - every concrete stage has one, the base has not
    inputs = {"teacher": teacher_print} | {name: job.artifacts[name].digest for name in stage.inputs}
    if kind in READS_DATA:
        inputs["data"] = data_print
    if kind == "evaluate":
        inputs["world"] = str(WORLD_VERSION)
    key = digest_of({"kind": kind, "spec": spec_for_key(stage), "inputs": inputs})
    quiet_libraries()
    standing = read_artifact(folder, key)
    if standing is not None:
        job.reporter.say("  stands, skipped")
        return standing
    return make_artifact(
        folder,
        kind=kind,
        key=key,
        spec=stage.model_dump(mode="json"),
        inputs=inputs,
        work=lambda partial: RUNNERS[kind](stage, job, partial),
        scratch=SCRATCH.get(kind, ()),
        replace=replace,
    )


def fingerprint_data(data: DataSpec) -> str:
    """What identifies training data: its spec, and a file's content.

    Raises:
        ValueError: the file is missing.
    """
    facts: dict[str, Any] = data.model_dump(mode="json")
    if isinstance(data, FileDataSpec):
        if not Path(data.path).is_file():
            raise ValueError(f"data.path: there is no file {data.path}; check the path")
        facts["sha256"] = fingerprint_file(data.path)
        del facts["path"]
    else:
        facts["world"] = WORLD_VERSION
    return digest_of(facts)


def check_against_teacher(recipe: RecipeSpec) -> None:
    """Find what a recipe asks of its teacher that the teacher does not have, before any work is done.

    Raises:
        ValueError: a layer out of range, or the folder is no checkpoint.
    """
    config = read_teacher_config(recipe.teacher)
    if config is None:
        return
    num_layers = config["num_hidden_layers"]
    for place, layers in recipe.layers_named().items():
        check_layers(layers, num_layers, place)
    for position, stage in enumerate(recipe.stages):
        if isinstance(stage, ConvertStage) and stage.num_layers is not None and stage.num_layers > num_layers:
            raise ValueError(
                f"recipe.stages[{position}].num_layers: {stage.num_layers} is out of range; the teacher has "
                f"{num_layers} layers, use 1..{num_layers}"
            )


def describe(stage: StageSpec) -> str:
    """A stage in a few words."""
    match stage:
        case ConvertStage():
            where = (
                f"layers {list(stage.layers)}"
                if stage.layers is not None
                else f"{stage.num_layers} layers by {stage.ranking}"
            )
            return f"convert {where} to {stage.mixer.type}, init {stage.init}"
        case EvaluateStage():
            return f"judge {stage.model} on {stage.problems_per_task} problems of {len(stage.tasks)} tasks"
        case _:
            kind = getattr(stage, "kind")  # noqa: B009
            return " ".join([kind, *stage.inputs])


def outcome(stage: StageSpec, artifact: Artifact) -> str:
    """What came out, in a line."""
    metrics = artifact.metrics
    seconds = f"({artifact.manifest['seconds']:.0f} s)"
    match getattr(stage, "kind"):  # noqa: B009
        case "rank":
            return (
                f"least important first: {metrics['order']} {seconds}"
                if metrics["order"]
                else f"evenly spaced {seconds}"
            )
        case "convert":
            return f"replaced {metrics['layers']} {seconds}"
        case "distill":
            return f"loss {metrics['final_loss_nats']:.4f} nat/token after {metrics['tokens']:,} tokens {seconds}"
        case "evaluate":
            whole = metrics["overall"]
            share = f"{whole['accuracy']:.1%} [{whole['low']:.1%}, {whole['high']:.1%}]"
            return f"{whole['correct']} of {whole['total']} right, {share} {seconds}"
        case _:
            return f"{artifact.folder / metrics['page']} {seconds}"

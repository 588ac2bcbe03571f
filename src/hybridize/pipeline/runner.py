"""Run a recipe: stage by stage, skipping what stands, going on where a killed run stopped."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from hybridize.data.sources import check_first
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
from hybridize.pipeline.layout_cost import check_serving
from hybridize.pipeline.locking import alone_in
from hybridize.pipeline.planning import read_teacher_config
from hybridize.pipeline.progress import Reporter, quiet_libraries
from hybridize.pipeline.stages import (
    RUNNERS,
    SCRATCH,
    Job,
    files_of,
    judges_in_world,
    spec_for_key,
)
from hybridize.spec.data import WORLD_VERSION, DataSpec, FileDataSpec, HubDataSpec, TracesDataSpec, WorldDataSpec
from hybridize.spec.expansion import expand
from hybridize.spec.layout import check_layers
from hybridize.spec.recipe import RecipeSpec
from hybridize.spec.stages import (
    ConvertStage,
    DataStage,
    EvaluateStage,
    FitStage,
    HarnessStage,
    MergeStage,
    OnPolicyStage,
    RankStage,
    ReportStage,
    SearchStage,
    StageSpec,
    TextStage,
    ThroughputStage,
    TracesStage,
    TrainStage,
)

RECIPE_FILE = "recipe.json"
LOCK_FILE = ".lock"


def run_recipe(recipe: RecipeSpec, reporter: Reporter | None = None, jobs: int = 1) -> dict[str, Artifact]:
    """Run all stages of a recipe into its output folder.

    A stage whose result stands, made from the same spec, data, teacher and inputs, is skipped.

    Args:
        recipe: the job.
        reporter: where progress goes.
        jobs: stages done at a time; above 1 each in a process of its own, as soon as what it reads is finished.

    Returns:
        The finished stages by name, in the order of `expand(recipe, ...)`.

    Raises:
        ValueError: the recipe does not fit the teacher, an input is malformed, an artifact was damaged, or another
            process is running a recipe into that folder.
        StoppedError: the disk is full, a loss is no number, or several stages failed.
    """
    if jobs < 1:
        raise ValueError(f"jobs: {jobs} is out of range; use 1 or more")
    reporter = reporter or Reporter()
    written, num_layers = recipe, check_against_teacher(recipe)
    recipe = expand(written, num_layers)
    output = recipe.output_folder
    for stage in recipe.stages:
        check_target(output / stage.name, replace=True)
    _check_files(recipe)
    with ExitStack() as held:
        with writing(output):
            held.enter_context(alone_in(output, output / LOCK_FILE, reporter.say))
            facts = {"num_layers": num_layers, "recipe": written.model_dump(mode="json")}
            write_whole(output / RECIPE_FILE, json.dumps(facts, indent=1))
        job = Job(recipe.teacher, recipe.data, reporter)
        teacher_print = fingerprint_model(recipe.teacher)
        if jobs > 1:
            return _run_side_by_side(recipe, written, num_layers, job, teacher_print, jobs)
        for number, stage in enumerate(recipe.stages, 1):
            reporter.say(f"[bold]{number}/{len(recipe.stages)} {stage.name}[/bold]  {escape(describe(stage))}")
            if isinstance(stage, ReportStage):
                from hybridize.pipeline.reporting import make_report

                artifact = make_report(stage, written, num_layers, job.artifacts, output)
            else:
                artifact = run_stage(stage, job, output / stage.name, teacher_print, replace=True)
            job.artifacts[stage.name] = artifact
            reporter.say(f"  {escape(outcome(stage, artifact))}")
        return job.artifacts


def _run_side_by_side(
    recipe: RecipeSpec, written: RecipeSpec, num_layers: int, job: Job, teacher_print: str, jobs: int
) -> dict[str, Artifact]:
    from hybridize.pipeline.parallel import run_side_by_side, threads_of_each, usable_cpus
    from hybridize.pipeline.reporting import make_report
    from hybridize.pipeline.worker import Run

    output = recipe.output_folder
    draws_bars = job.reporter.console.is_terminal

    def standing(stage: StageSpec, artifacts: Mapping[str, Artifact]) -> Artifact | None:
        known = Job(job.teacher, job.data, job.reporter, dict(artifacts))
        return read_artifact(output / stage.name, identify(stage, known, teacher_print)[0])

    return run_side_by_side(
        recipe.stages,
        Run(job.teacher, teacher_print, job.data, output, threads_of_each(jobs), usable_cpus(), draws_bars),
        jobs,
        job.reporter,
        standing=standing,
        report=lambda stage, artifacts: make_report(stage, written, num_layers, artifacts, output),
        describe=describe,
        outcome=outcome,
    )


def identify(stage: StageSpec, job: Job, teacher_print: str) -> tuple[str, dict[str, str]]:
    """The key of what a stage would make, and digests of what it would be made from, by name."""
    inputs = {"teacher": teacher_print} | {name: job.artifacts[name].digest for name in stage.inputs}
    inputs |= {name: fingerprint() for name, fingerprint in outside_inputs(stage, job.data).items()}
    kind = getattr(stage, "kind")  # noqa: B009 - every concrete stage has one, the base has not
    return digest_of({"kind": kind, "spec": spec_for_key(stage), "inputs": inputs}), inputs


def run_stage(stage: StageSpec, job: Job, folder: Path, teacher_print: str, *, replace: bool = False) -> Artifact:
    """Run one stage, unless its result stands."""
    kind = getattr(stage, "kind")  # noqa: B009 - as above
    key, inputs = identify(stage, job, teacher_print)
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
        work=lambda unfinished: RUNNERS[kind](stage, job, unfinished),
        scratch=SCRATCH.get(kind, ()),
        replace=replace,
        say=job.reporter.say,
    )


def _check_files(recipe: RecipeSpec) -> None:
    """Raise a `ValueError` before any work is done if a file is not there, or does not start as who reads it needs."""
    seen: set[tuple[str, bool]] = set()
    if isinstance(recipe.data, FileDataSpec):
        _check_there(recipe.data.path, "data.path")
    for stage in recipe.stages:
        for field, path in files_of(stage).items():
            if not Path(path).exists():
                raise ValueError(f"{stage.name}.{field}: there is no file {path}; check the path")
        if not isinstance(stage, DataStage):
            continue
        data = stage.data or (None if isinstance(stage, RankStage) else recipe.data)  # some rankings read nothing
        wanted = isinstance(stage, TracesStage | OnPolicyStage)
        if not isinstance(data, FileDataSpec) or (data.path, wanted) in seen:
            continue
        seen.add((data.path, wanted))
        _check_there(data.path, f"{stage.name}.data.path")
        try:
            check_first(data, prompts=wanted)
        except ValueError as error:
            raise ValueError(f"{stage.name}.data: {error}") from None


def _check_there(path: str, place: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"{place}: there is no file {path}; check the path")


def outside_inputs(stage: StageSpec, data: DataSpec) -> dict[str, Callable[[], str]]:
    """What identifies all that a stage reads beside models, traces and rankings, worked out when it is called.

    Args:
        stage: of a recipe.
        data: what it reads unless it has data of its own.

    Returns:
        By the name that its manifest gives it: `data`, `world`, or the field that names a file. Each raises a
        `ValueError` if what it is about is missing.
    """
    found: dict[str, Callable[[], str]] = {}
    if isinstance(stage, DataStage):
        found["data"] = partial(fingerprint_data, stage.data or data)
    if judges_in_world(stage):
        found["world"] = lambda: str(WORLD_VERSION)
    for field, path in files_of(stage).items():
        found[field] = partial(fingerprint_path, path, f"{stage.name}.{field}")
    return found


def fingerprint_data(data: DataSpec) -> str:
    """What identifies training data: its spec, and a file's content. Traces are identified by their stage's result.

    Raises:
        ValueError: the file is missing.
    """
    facts: dict[str, Any] = data.model_dump(mode="json")
    match data:
        case FileDataSpec():
            facts |= {"path": None, "sha256": fingerprint_path(data.path, "data.path")}
        case HubDataSpec() if Path(data.dataset).is_dir():
            facts |= {"dataset": None, "sha256": fingerprint_path(data.dataset, "data.dataset")}
        case WorldDataSpec():
            facts["world"] = WORLD_VERSION
        case TracesDataSpec():
            del facts["stage"]
    return digest_of(facts)


def fingerprint_path(path: str, place: str) -> str:
    """SHA-256 over a file's content, or over all files of a folder.

    Raises:
        ValueError: there is no such file or folder.
    """
    root = Path(path)
    if root.is_file():
        return fingerprint_file(root)
    if not root.is_dir():
        raise ValueError(f"{place}: there is no file {path}; check the path")
    files = sorted(file for file in root.rglob("*") if file.is_file())
    return digest_of([[str(file.relative_to(root)), fingerprint_file(file)] for file in files])


def check_against_teacher(recipe: RecipeSpec) -> int:
    """Find what a recipe asks of its teacher that the teacher does not have, before any work is done.

    Returns:
        The teacher's number of layers.

    Raises:
        ValueError: a layer out of range, or there is no checkpoint.
    """
    num_layers = int(read_teacher_config(recipe.teacher)["num_hidden_layers"])
    for place, layers in recipe.layers_named().items():
        check_layers(layers, num_layers, place)
    for position, stage in enumerate(recipe.stages):
        layout = stage.whole_layout if isinstance(stage, ConvertStage) else None
        if layout is not None and len(layout.layers) != num_layers:
            raise ValueError(
                f"recipe.stages[{position}].layout: it has {len(layout.layers)} layers, but the teacher has "
                f"{num_layers}; give one letter or mixer a layer"
            )
        if isinstance(stage, SearchStage) and stage.gpu is not None:
            check_serving(stage.gpu, stage.scenario, f"recipe.stages[{position}]")
        asked = stage.num_layers if isinstance(stage, ConvertStage | SearchStage) else None
        if asked is not None and asked > num_layers:
            raise ValueError(
                f"recipe.stages[{position}].num_layers: {asked} is out of range; the teacher has "
                f"{num_layers} layers, use 1..{num_layers}"
            )
    return num_layers


def describe(stage: StageSpec) -> str:
    """A stage in a few words."""
    match stage:
        case ConvertStage():
            if stage.layout is not None:
                where = f"{len(stage.made)} layers"
            elif stage.search is not None:
                where = "layers"
            elif stage.layers is not None:
                where = f"layers {list(stage.layers)}"
            else:
                where = f"{stage.num_layers} layers by {stage.ranking}"
            return f"convert {where} of {stage.model} to {stage.made_of}, init {stage.init}"
        case EvaluateStage():
            return f"judge {stage.model} on {stage.problems_per_task} problems of {len(stage.tasks)} tasks"
        case RankStage():
            return f"rank the layers of {stage.model} by {stage.method}"
        case SearchStage():
            return f"choose a mixer for each layer by {', '.join(stage.rankings)}"
        case HarnessStage():
            return f"judge {stage.model} on {', '.join(stage.tasks)}"
        case MergeStage():
            return f"merge {', '.join(stage.sources)} ({stage.method})"
        case _:
            kind = getattr(stage, "kind").replace("_", " ")  # noqa: B009
            return " ".join([kind, *stage.models])


def outcome(stage: StageSpec, artifact: Artifact) -> str:
    """What came out, in a line."""
    metrics = artifact.metrics
    seconds = f"({artifact.manifest['seconds']:.0f} s)"
    match stage:
        case RankStage():
            if not metrics["order"]:
                return f"evenly spaced {seconds}"
            return f"least important first: {metrics['order']} {seconds}"
        case SearchStage():
            return f"{metrics['layout']}, {metrics['speedup']:.2f} times as cheap. {metrics['verdict']} {seconds}"
        case ConvertStage():
            return f"replaced {metrics['layers']} {seconds}"
        case TracesStage():
            return (
                f"{metrics['verified']:,} of {metrics['samples']:,} answers right and kept, "
                f"{metrics['verified_tokens']:,} tokens {seconds}"
            )
        case TrainStage():
            stopped = f", {metrics['stopped']}" if metrics["stopped"] else ""
            loss = (
                f"loss {metrics['final_loss_relative']:.4f} of the output's mean square"
                if isinstance(stage, FitStage)
                else f"loss {metrics['final_loss_nats']:.4f} nat/token"
            )
            return f"{loss} after {metrics['tokens']:,} tokens{stopped} {seconds}"
        case EvaluateStage():
            whole = metrics["overall"]
            share = f"{whole['accuracy']:.1%} [{whole['low']:.1%}, {whole['high']:.1%}]"
            return f"{whole['correct']} of {whole['total']} right, {share} {seconds}"
        case TextStage():
            return f"{metrics['nats_per_token']:.4f} nat/token, perplexity {metrics['perplexity']:.2f} {seconds}"
        case ThroughputStage():
            return f"{metrics['tokens_per_second']:,.0f} tokens/s {seconds}"
        case ReportStage():
            return f"{artifact.folder / metrics['page']} {seconds}"
        case _:
            return f"done {seconds}"

"""The command `hybridize`: one short function per verb; everything heavy is imported inside it."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="hybridize",
    help="Turn a pretrained reasoning transformer into a fast hybrid: rank, convert, distil, judge, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
_TeacherArgument = Annotated[str, typer.Argument(help="Folder of the teacher, or its name on the hub.")]
_DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Chats to train on, JSON lines; default: the built-in reasoning world."),
]
_MixerOption = Annotated[
    str, typer.Option(help="What replaces attention: mamba1 (the paper's), or e.g. '{type: mamba1, state_size: 8}'.")
]
_InitOption = Annotated[str, typer.Option(help="How a mixer starts: aligned, published (the paper's MIL) or random.")]
_SeedOption = Annotated[int, typer.Option(help="Of data and random draws.")]


@app.command()
def run(recipe: _RecipeArgument) -> None:
    """Do a whole job: every stage of a recipe, going on where a killed run stopped."""
    from hybridize.pipeline.reporting import collect
    from hybridize.pipeline.runner import run_recipe
    from hybridize.report import console_summary
    from hybridize.spec.recipe import load_recipe

    spec = load_recipe(recipe)
    artifacts = run_recipe(spec)
    finished = {name: a for name, a in artifacts.items() if a.manifest["kind"] != "report"}
    _print(console_summary(collect(spec, finished)))
    for artifact in artifacts.values():
        if artifact.manifest["kind"] == "report":
            typer.echo(f"report: {artifact.folder / artifact.metrics['page']}")


@app.command()
def plan(
    recipe: _RecipeArgument,
    tflops: Annotated[float, typer.Option(help="Sustained speed to reckon hours with, in TFLOP/s.")] = 400.0,
) -> None:
    """Say what a recipe would do and cost; trains nothing, loads no model."""
    from hybridize.pipeline.planning import TeacherShape, plan_recipe, read_teacher_config
    from hybridize.pipeline.runner import check_against_teacher
    from hybridize.spec.recipe import load_recipe

    spec = load_recipe(recipe)
    check_against_teacher(spec)
    config = read_teacher_config(spec.teacher)
    if config is None:
        raise ValueError(f"teacher: {spec.teacher} is on the hub; download it first, a plan reads its config.json")
    shape = TeacherShape.of(config)
    typer.echo(
        f"{spec.name}: teacher {spec.teacher}, {shape.parameters / 1e6:,.1f}M parameters, {shape.num_layers} layers"
    )
    _print(_plan_table(plan_recipe(spec, shape), tflops))


@app.command()
def rank(
    teacher: _TeacherArgument,
    out: Annotated[Path, typer.Option(help="The ranking file to write.")],
    method: Annotated[str, typer.Option(help="mmr (the paper's), or the controls uniform and random.")] = "mmr",
    mixer: _MixerOption = "mamba1",
    init: _InitOption = "aligned",
    steps: Annotated[int, typer.Option(help="Training steps per layer.")] = 100,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step.")] = 16384,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a packed row.")] = 16384,
    learning_rate: Annotated[float, typer.Option(help="Of the swapped mixer.")] = 1e-3,
    data: _DataOption = None,
    seed: _SeedOption = 0,
) -> None:
    """Rank a teacher's attention layers, least important first, with the controls beside it."""
    from hybridize.files import write_whole
    from hybridize.pipeline.artifacts import writing
    from hybridize.pipeline.stages import RANKING_FILE

    _check_new_file(out)
    stage = _stage(
        "rank",
        name="rank",
        method=method,
        mixer=_read_mixer(mixer),
        init=init,
        steps=steps,
        tokens_per_step=tokens_per_step,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        seed=seed,
    )
    work = out.parent / f".{out.name}.work"
    artifact = _run_alone(stage, teacher, data, work)
    with writing(out):
        write_whole(out, (artifact.folder / RANKING_FILE).read_text())
    _remove(work)
    typer.echo(f"ranking: {out}")


@app.command()
def convert(
    teacher: _TeacherArgument,
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    layers: Annotated[str | None, typer.Option(help="Layers to replace, e.g. 3,5,6; or none.")] = None,
    ranking: Annotated[Path | None, typer.Option(help="A ranking file that decides instead.")] = None,
    num: Annotated[int | None, typer.Option(help="How many layers, with --ranking.")] = None,
    mixer: _MixerOption = "mamba1",
    init: _InitOption = "aligned",
    explain: Annotated[bool, typer.Option(help="Print where every tensor comes from.")] = False,
    seed: _SeedOption = 0,
) -> None:
    """Replace attention layers by mixers that start from the attention's own weights."""
    from hybridize.models import check_output, load_teacher, save_hybrid
    from hybridize.pipeline.artifacts import writing
    from hybridize.pipeline.progress import quiet_libraries
    from hybridize.pipeline.stages import load_tokenizer
    from hybridize.spec.base import choose
    from hybridize.spec.layout import LayoutSpec
    from hybridize.transfer import convert as convert_model

    quiet_libraries()
    choose("--init", init, ("aligned", "published", "random"))
    spec = _read_mixer(mixer)
    check_output(out)
    chosen, num_ranked = _parse_layers(layers, ranking, num)
    model = load_teacher(teacher)
    num_layers = model.config.num_hidden_layers
    if num_ranked not in (None, num_layers):
        raise ValueError(
            f"--ranking: {ranking} ranks a model of {num_ranked} layers, but {teacher} has {num_layers}; give its own"
        )
    layout = LayoutSpec.replace(num_layers, chosen, spec, "--layers")
    hybrid, plan = convert_model(model, layout, init, seed, share=True)
    tokenizer = load_tokenizer(teacher)
    with writing(out):
        save_hybrid(hybrid, tokenizer, out)
    typer.echo(str(plan) if explain else f"{out}: layout {plan.layout}, init {init}; --explain lists every tensor")


@app.command()
def distill(
    student: Annotated[Path, typer.Argument(help="Folder of the hybrid.")],
    teacher: _TeacherArgument,
    out: Annotated[Path, typer.Argument(help="Folder to write; a killed call goes on when called again.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")],
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step.")] = 64 * 16384,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a packed row.")] = 16384,
    rows_per_batch: Annotated[int, typer.Option(help="Rows computed at a time.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-6,
    loss: Annotated[str, typer.Option(help="reverse_kl (the paper's), forward_kl or jsd.")] = "reverse_kl",
    train: Annotated[str, typer.Option(help="all weights (the paper), or mixers only.")] = "all",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    data: _DataOption = None,
    seed: _SeedOption = 0,
) -> None:
    """Train a hybrid to follow its teacher, token by token."""
    from hybridize.pipeline.artifacts import Artifact, fingerprint_model
    from hybridize.pipeline.stages import check_checkpoint

    stage = _stage(
        "distill",
        name="distill",
        model="student",
        steps=steps,
        tokens_per_step=tokens_per_step,
        sequence_length=sequence_length,
        rows_per_batch=rows_per_batch,
        learning_rate=learning_rate,
        loss=loss,
        train=train,
        save_every=save_every,
        seed=seed,
    )
    if not student.is_dir():
        raise ValueError(f"{student}: there is no such folder; give the folder of a hybrid that was converted")
    check_checkpoint(str(student))
    print_of_student = fingerprint_model(student, whole=True)
    _run_alone(stage, teacher, data, out, {"student": Artifact(student, {"files": print_of_student})})
    typer.echo(f"distilled: {out}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a teacher or a hybrid.")],
    level: Annotated[int, typer.Option(help="Difficulty, 1..8.")] = 2,
    problems: Annotated[int, typer.Option(help="Unseen problems per task.")] = 250,
    tasks: Annotated[str, typer.Option(help="Tasks, by comma.")] = "quantities,addition,swaps,recall",
    batch_size: Annotated[int, typer.Option(help="Problems answered at a time.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the scores here too, as JSON.")] = None,
) -> None:
    """Judge a model by what it generates on unseen problems."""
    import json

    from hybridize.data.world import TASKS
    from hybridize.files import write_whole
    from hybridize.pipeline.artifacts import writing
    from hybridize.pipeline.progress import Reporter, quiet_libraries
    from hybridize.pipeline.stages import evaluate_model
    from hybridize.spec.base import choose

    quiet_libraries()
    if out:
        _check_new_file(out)
    names = tuple(choose("--tasks", name.strip(), TASKS) for name in tasks.split(","))
    stage = _stage(
        "evaluate",
        name="evaluate",
        model="teacher",
        level=level,
        problems_per_task=problems,
        tasks=names,
        batch_size=batch_size,
    )
    summary = evaluate_model(stage, model, model, Reporter())
    for name, score in {"overall": summary["overall"], **summary["tasks"]}.items():
        typer.echo(
            f"{name:12} {score['correct']:5} of {score['total']:5}  {score['accuracy']:6.1%}  "
            f"[{score['low']:.1%}, {score['high']:.1%}]  by right steps {score['steps_correct']}"
        )
    if out:
        with writing(out):
            write_whole(out, json.dumps(summary, indent=1))


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of `hybridize run`.")],
) -> None:
    """Write the report of a run anew, from the stages that have finished."""
    from hybridize.pipeline.reporting import rewrite_report

    typer.echo(f"report: {rewrite_report(run_folder)}")


def _stage(kind: str, **fields: Any) -> Any:
    """Build a stage spec from the command line, with errors that name the option."""
    from pydantic import ValidationError

    from hybridize.spec.base import explain
    from hybridize.spec.stages import STAGE_KINDS

    try:
        return STAGE_KINDS[kind].model_validate(fields)
    except ValidationError as error:
        raise ValueError(explain(error, kind)) from None


def _run_alone(stage: Any, teacher: str, data: Path | None, out: Path, inputs: dict[str, Any] | None = None) -> Any:
    """Run one stage outside a recipe."""
    from hybridize.pipeline.artifacts import fingerprint_model
    from hybridize.pipeline.progress import Reporter
    from hybridize.pipeline.runner import fingerprint_data, run_stage
    from hybridize.pipeline.stages import Job
    from hybridize.spec.data import FileDataSpec, WorldDataSpec

    source = FileDataSpec(path=str(data)) if data else WorldDataSpec()
    job = Job(teacher, source, Reporter(), dict(inputs or {}))
    return run_stage(stage, job, out, fingerprint_model(teacher), fingerprint_data(source))


def _check_new_file(out: Path) -> None:
    """Find out that a file cannot be written before the work is done, not after."""
    from hybridize.pipeline.artifacts import writing

    if out.exists():
        raise ValueError(f"{out}: it exists already and nothing is overwritten; remove it or give another name")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.with_name(f".{out.name}.tmp")
        probe.touch()
        probe.unlink()


def _read_mixer(text: str) -> Any:
    """A mixer by its name, or as a mapping with its sizes."""
    import yaml

    from hybridize.spec.base import choose
    from hybridize.spec.mixers import MIXER_TYPES, parse_mixer

    value: Any = text
    if text.lstrip().startswith("{"):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"--mixer: {text!r} is no mapping; write e.g. '{{type: mamba1, state_size: 8}}'") from None
    kind = value.get("type") if isinstance(value, dict) else value
    choose("--mixer", str(kind), [name for name in MIXER_TYPES if name != "attention"])
    return parse_mixer(value, "--mixer")


def _parse_layers(layers: str | None, ranking: Path | None, num: int | None) -> tuple[tuple[int, ...], int | None]:
    """The layers to replace, and of a ranking, how many layers its model has."""
    if (layers is None) == (ranking is None):
        raise ValueError("convert: say which layers, by --layers 3,5,6 (or none), or by --ranking FILE --num N")
    if layers is not None:
        if num is not None:
            raise ValueError("--num: goes with --ranking only; leave it out")
        if layers.strip() == "none":
            return (), None
        try:
            return tuple(int(part) for part in layers.split(",")), None
        except ValueError:
            raise ValueError(f"--layers: {layers!r} is no list of numbers; write 3,5,6 or none") from None
    from hybridize.importance import load_ranking

    if num is None:
        raise ValueError("--num: say how many layers of the ranking to replace")
    assert ranking is not None
    ranked = load_ranking(ranking)
    return ranked.choose(num, "--num"), ranked.num_layers


def _plan_table(costs: list[Any], tflops: float) -> Any:
    from rich.table import Table

    table = Table("stage", "what")
    for column in ("tokens", "trained", "operations", f"time at {tflops:g} TFLOP/s"):
        table.add_column(column, justify="right")
    for cost in costs:
        table.add_row(
            cost.name,
            cost.what,
            f"{cost.tokens:,}" if cost.tokens else "",
            f"{cost.trained / 1e6:,.1f}M" if cost.trained else "",
            *(_show_work(cost.operations, tflops) if cost.operations else ("", "")),
        )
    table.add_section()
    table.add_row("all", "", "", "", *_show_work(sum(cost.operations for cost in costs), tflops))
    return table


def _show_work(operations: float, tflops: float) -> tuple[str, str]:
    """Floating-point operations and the time they take, in units a person reads."""
    unit, name = next((u, n) for u, n in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (0.0, "G")) if operations >= u)
    seconds = operations / (tflops * 1e12)
    size, word = next((s, w) for s, w in ((3600.0, "h"), (60.0, "min"), (0.0, "s")) if seconds >= s)
    return f"{operations / (unit or 1e9):,.1f} {name}FLOP", f"{seconds / (size or 1.0):,.1f} {word}"


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(renderable)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run the command; a user's mistake ends in one clear message and exit code 2.

    With HYBRIDIZE_DEBUG set, errors keep their traceback.
    """
    from hybridize.spec.base import StoppedError

    debug = bool(os.environ.get("HYBRIDIZE_DEBUG"))
    try:
        app()
    except (ValueError, ImportError, OSError, StoppedError) as error:
        if debug:
            raise
        stopped = isinstance(error, StoppedError)
        typer.echo(f"hybridize: {'stopped' if stopped else 'error'}: {_message(error)}", err=True)
        raise SystemExit(1 if stopped else 2) from None
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for its name
            raise
        remedy = "use smaller batches (rows_per_batch, batch_size) or a shorter sequence_length"
        typer.echo(f"hybridize: stopped: {str(error).splitlines()[0]} {remedy}; the same command goes on", err=True)
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            typer.echo("hybridize: interrupted; the same command goes on from what is finished", err=True)
        raise


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}; check the path and its permissions"
    return str(error)

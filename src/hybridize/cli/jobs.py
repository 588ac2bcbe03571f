"""Verbs for whole jobs: run, plan, report."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridize.cli.options import RecipeArgument


def run(recipe: RecipeArgument) -> None:
    """Do a whole job: every stage of a recipe, going on where a killed run stopped."""
    from hybridize.pipeline.collecting import collect
    from hybridize.pipeline.runner import check_against_teacher, run_recipe
    from hybridize.report import console_summary
    from hybridize.spec.recipe import load_recipe

    spec = load_recipe(recipe)
    artifacts = run_recipe(spec)
    finished = {name: a for name, a in artifacts.items() if a.manifest["kind"] != "report"}
    _print(console_summary(collect(spec, check_against_teacher(spec), finished)))
    for artifact in artifacts.values():
        if artifact.manifest["kind"] == "report":
            typer.echo(f"report: {artifact.folder / artifact.metrics['page']}")


def plan(
    recipe: RecipeArgument,
    config: Annotated[
        Path | None, typer.Option(help="The teacher's config.json, if the teacher itself is not at hand.")
    ] = None,
    tflops: Annotated[float, typer.Option(help="Sustained speed to reckon hours with, in TFLOP/s per GPU.")] = 400.0,
) -> None:
    """Say what a recipe would do and cost; trains nothing, loads no model."""
    from hybridize.pipeline.planning import TeacherShape, plan_recipe, read_teacher_config
    from hybridize.pipeline.runner import check_against_teacher
    from hybridize.spec.recipe import load_recipe

    spec = load_recipe(recipe)
    if config is not None:
        spec = spec.model_copy(update={"teacher": str(config.parent)})
    check_against_teacher(spec)
    shape = TeacherShape.of(read_teacher_config(spec.teacher))
    typer.echo(
        f"{spec.name}: teacher {spec.teacher}, {shape.parameters / 1e6:,.1f}M parameters, {shape.num_layers} layers"
    )
    _print(_plan_table(plan_recipe(spec, shape), tflops))


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of `hybridize run`.")],
) -> None:
    """Write the report of a run anew, from the stages that have finished."""
    from hybridize.pipeline.reporting import rewrite_report

    typer.echo(f"report: {rewrite_report(run_folder)}")


def _plan_table(costs: list[Any], tflops: float) -> Any:
    from rich.table import Table

    caption = f"GPU time at {tflops:g} TFLOP/s; memory of one copy of everything, before it is spread over GPUs"
    table = Table("stage", "what", caption=caption)
    for column in ("tokens", "trained", "memory", "operations", "GPU time"):
        table.add_column(column, justify="right")
    for cost in costs:
        table.add_row(
            cost.name,
            cost.what,
            f"{cost.tokens:,}" if cost.tokens else "",
            f"{cost.trained / 1e6:,.1f}M" if cost.trained else "",
            f"{cost.memory / 2**30:,.1f} GiB" if cost.memory else "",
            *(_show_work(cost.operations, tflops) if cost.operations else ("", "")),
        )
    table.add_section()
    most = max(cost.memory for cost in costs)
    table.add_row(
        "all",
        "",
        f"{sum(cost.tokens for cost in costs):,}",
        "",
        f"{most / 2**30:,.1f} GiB",
        *_show_work(sum(cost.operations for cost in costs), tflops),
    )
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

"""Verbs for whole jobs: run, plan, report."""

import sys
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridize.cli.options import RecipeArgument


def run(
    recipe: RecipeArgument,
    jobs: Annotated[
        int, typer.Option(help="Stages done at a time, each in a process of its own; these take turns at the GPUs.")
    ] = 1,
) -> None:
    """Do a whole job: every stage of a recipe, going on where a killed run stopped."""
    from hybridize.pipeline.collecting import collect
    from hybridize.pipeline.runner import check_against_teacher, run_recipe
    from hybridize.report import console_summary
    from hybridize.spec.recipe import load_recipe

    spec = load_recipe(recipe)
    artifacts = run_recipe(spec, jobs=jobs)
    finished = {name: a for name, a in artifacts.items() if a.manifest["kind"] != "report"}
    _print(console_summary(collect(spec, check_against_teacher(spec), finished, run=spec.output_folder)))
    for artifact in artifacts.values():
        if artifact.manifest["kind"] == "report":
            typer.echo(f"report: {artifact.folder / artifact.metrics['page']}")


def plan(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a YAML file; none with --serve.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The teacher's config.json, if the teacher itself is not at hand.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Sustained speed to reckon hours with, in TFLOP/s per GPU; by default 400.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Predict instead what serving a teacher and its hybrids with vLLM costs.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="With --serve: folder, name on the hub, or a shape: apriel-15b.")
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="With --serve: name=word, a letter per layer; am*25 is am 25 times. Repeatable."),
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="With --serve: tokens read and written, e.g. 1k:8k. Repeatable.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="With --serve: h200, h100, a100 or l40s.")] = None,
    memory_gib: Annotated[float | None, typer.Option(help="With --serve: the GPU's memory.")] = None,
    bandwidth_tbs: Annotated[float | None, typer.Option(help="With --serve: its memory's bandwidth, TB/s.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="With --serve: share of the memory for vLLM; by default 0.9.")
    ] = None,
    state_dtype: Annotated[str | None, typer.Option(help="With --serve: float32 (the default) or bfloat16.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="With --serve: of the GPU, in dollars.")] = None,
) -> None:
    """Say what a recipe would do and cost, or with --serve what serving would; trains nothing, loads no model."""
    serving = {
        "--teacher": teacher,
        "--layout": layout,
        "--scenario": scenario,
        "--gpu": gpu,
        "--memory-gib": memory_gib,
        "--bandwidth-tbs": bandwidth_tbs,
        "--gpu-memory-utilization": gpu_memory_utilization,
        "--state-dtype": state_dtype,
        "--price-per-hour": price_per_hour,
    }
    unused = {"--config": config, "--tflops": tflops} if serve else serving if recipe is not None else {}
    for option, value in unused.items():
        if value is not None:
            raise ValueError(f"{option}: it is {'not for' if serve else 'for'} plan --serve; leave it out")
    if serve:
        if recipe is not None:
            raise ValueError(f"plan --serve: it reads no recipe, but {recipe} is given; use --teacher and --layout")
        hardware = (gpu, memory_gib, bandwidth_tbs)
        _plan_serving(
            teacher or "apriel-15b",
            layout or [],
            scenario or [],
            hardware,
            0.9 if gpu_memory_utilization is None else gpu_memory_utilization,
            state_dtype or "float32",
            price_per_hour,
        )
        return
    if tflops is not None and not tflops > 0:
        raise ValueError(f"--tflops: {tflops:g} is out of range; use more than 0")
    if recipe is None:
        raise ValueError("plan: the recipe is missing; give a YAML file, or --serve to plan serving")
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
    _print(_plan_table(plan_recipe(spec, shape), 400.0 if tflops is None else tflops))


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


def _plan_serving(
    teacher: str,
    layouts: list[str],
    scenarios: list[str],
    hardware: tuple[str | None, float | None, float | None],
    utilization: float,
    state_dtype: str,
    price: float | None,
) -> None:
    from hybridize.bench.scenarios import PAPER_LAYOUTS, SCENARIOS, read_layouts, read_scenarios
    from hybridize.pipeline.serving_cost import plan_serving, read_gpu, read_serving_teacher

    if price is not None and not (isfinite(price) and price >= 0):
        raise ValueError(f"--price-per-hour: {price:g} is out of range; use 0 or more")
    config = read_serving_teacher(teacher)
    if not layouts and teacher != "apriel-15b":
        raise ValueError(f"plan --serve: no layout for {teacher}; give one or more, e.g. --layout name=am*12")
    words = read_layouts(layouts, PAPER_LAYOUTS, config["num_hidden_layers"])
    gpu = read_gpu(*hardware)
    asked = read_scenarios(scenarios) or SCENARIOS
    plan = plan_serving(config, words, gpu, asked, utilization=utilization, state_dtype=state_dtype)
    _print(_serving_table(plan.rows, price))
    for warning in plan.warnings:
        typer.echo(f"warning: {warning}")


def _serving_table(rows: Sequence[Any], price: float | None) -> Any:
    from rich.table import Table

    caption = "sequences: that the memory holds complete; floor: what a step must move, at the speed of a large copy"
    table = Table("scenario", "model", caption=caption)
    for column in ("KV groups", "sequences", "ms a step", "floor", "tokens/s", "x teacher"):
        table.add_column(column, justify="right")
    table.add_column("GPU h per M tokens" if price is None else "$ per M tokens", justify="right")
    teacher = 0.0
    for i, (name, scenario, expected) in enumerate(rows):
        if i and scenario != rows[i - 1][1]:
            table.add_section()
        if not i or scenario != rows[i - 1][1]:
            teacher = expected.tokens_per_second
        if not expected.sequences:
            table.add_row(str(scenario), name, str(expected.groups), "0", *["-"] * 5)
            continue
        table.add_row(
            str(scenario),
            name,
            str(expected.groups),
            f"{expected.sequences:,}",
            f"{expected.step_ms:.1f}",
            f"{expected.floor_ms:.1f}",
            f"{expected.tokens_per_second:,.0f}",
            f"{expected.tokens_per_second / teacher:.2f}" if teacher else "-",
            f"{expected.gpu_hours_per_million * (1 if price is None else price):,.3f}",
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

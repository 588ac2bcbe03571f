"""The verb search: a mixer for each layer."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridize.cli.options import TeacherArgument, check_new_file, make_stage


def search(
    teacher: TeacherArgument,
    rankings: Annotated[list[Path], typer.Argument(help="Ranking files of `hybridize rank`, each for another mixer.")],
    speedup: Annotated[
        float | None, typer.Option(help="How many times less than the teacher a step must move, at least.")
    ] = None,
    num: Annotated[int | None, typer.Option(help="How many layers to replace, exactly.")] = None,
    context_tokens: Annotated[
        int | None, typer.Option(help="Length of the sequences that costs are reckoned for; by default 8192.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Sequences that share the reading of the weights; by default 64.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Reckon with the speed predicted for vLLM on h200, h100, a100 or l40s instead.")
    ] = None,
    scenario: Annotated[str | None, typer.Option(help="With --gpu: tokens read and written, by default 1k:8k.")] = None,
    max_groups: Annotated[int | None, typer.Option(help="Most groups of layers in vLLM's cache.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write everything here, as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the frontier here, as PNG.")] = None,
) -> None:
    """Choose a mixer for each layer: the least predicted loss at a cost, beside single mixers and even spacing."""
    from hybridize.files import write_whole
    from hybridize.importance import load_ranking, save_search
    from hybridize.pipeline.artifacts import writing
    from hybridize.pipeline.planning import read_teacher_config
    from hybridize.pipeline.searches import show_search
    from hybridize.pipeline.stages.searching import search_for

    if gpu is None and scenario is not None:
        raise ValueError("--scenario: without --gpu nothing is predicted for it; give --gpu, or leave it out")
    sizes = {"context_tokens": context_tokens, "concurrency": concurrency, "scenario": scenario}
    given = {name: value for name, value in sizes.items() if value is not None}
    for name in ("context_tokens", "concurrency"):
        if gpu is not None and name in given:
            raise ValueError(f"--{name.replace('_', '-')}: with --gpu, --scenario says what costs are reckoned for")
    if picture and picture.suffix != ".png":
        raise ValueError(f"--picture: {picture} does not end in .png, as what is drawn does; call it so")
    if out and picture and out.resolve() == picture.resolve():
        raise ValueError(f"--picture: {picture} is --out as well; give each a file of its own")
    for file in (out, picture):
        if file:
            check_new_file(file)
    stage = make_stage(
        "search",
        rankings=tuple(map(str, rankings)),
        speedup=speedup,
        num_layers=num,
        gpu=gpu,
        max_groups=max_groups,
        **given,
    )
    loaded = {str(file): load_ranking(file) for file in rankings}
    result = search_for(stage, loaded, read_teacher_config(teacher))
    if out:
        with writing(out):
            save_search(result, out)
    if picture:
        from hybridize.report import plots

        with writing(picture):
            write_whole(picture, plots.search_chart(show_search("search", result)))
    _print(result)
    init = result.target.get("init")
    option = f" --init {init}" if init else ""
    typer.echo(f"next: hybridize convert {teacher} OUT --search {out or 'FILE (write it with --out)'}{option}")


def _shown(mixer: Any) -> str:
    """A mixer's kind, with the sizes that are not its kind's default."""
    own, default = mixer.model_dump(), type(mixer)().model_dump()
    sizes = [f"{name}={own[name]}" for name in own if default[name] is not None and own[name] != default[name]]
    return mixer.type + (f" ({', '.join(sizes)})" if sizes else "")


def _print(result: Any) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    caption = f"best of each number of layers, by {result.method}; cost: {result.cost_unit}"
    table = Table(Column("layout", overflow="fold"), caption=caption)
    for column in ("replaced", "cost", "x cheaper", "KV groups", f"predicted loss\n{result.unit}"):
        table.add_column(column, justify="right")
    # The frontier goes from the cheapest upwards, so of each number of layers the least loss stays.
    best = {found.num_replaced: found for found in result.frontier}
    for found in sorted({result.chosen, *best.values()}, key=lambda found: -found.cost):
        table.add_row(
            f"[bold]{found.layout}[/bold]" if found == result.chosen else found.layout,
            str(found.num_replaced),
            f"{found.cost:.4g}",
            f"{found.speedup:.2f}",
            str(found.groups),
            f"{found.loss:.4g}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    names = ", ".join(f"{letter} {_shown(mixer)}" for letter, mixer in result.blocks.items())
    typer.echo(f"a attention, {names}. {'Exact' if result.exact else 'Greedy'}. {result.verdict}")
    chosen = result.chosen
    typer.echo(
        f"layout: {chosen.layout} ({chosen.speedup:.2f} times as cheap, predicted loss {chosen.loss:.4g} {result.unit})"
    )

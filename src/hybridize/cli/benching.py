"""Verbs that measure speed alone, whatever the weights: `bench kernels`, `bench serve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hybridize.bench.serving import ServedModel

bench = typer.Typer(
    name="bench",
    help="Measure kernels, and models in vLLM, beside rivals and the hardware's floor.",
    no_args_is_help=True,
)

_LOSS = "distillation_loss"
_SMALL: dict[str, Any] = {"channels": 256, "states": 16, "heads": 16, "groups": 8, "length": 1024, "head_dim": 32}
_SMALL_LOSS: dict[str, Any] = {"num_tokens": 512, "width": 256, "vocabulary": 4096}


@bench.command()
def kernels(
    out: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured; must not exist.")] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(
            help="selective_scan, causal_conv, ssd, gated_delta_rule, kimi_delta_attention, attention, "
            "distillation_loss; their decode steps, with _step behind the name. By default all."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="A PNG: measure the scan from 1k to 256k tokens as well, and draw what a token costs."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of which the median counts.")] = 30,
    small: Annotated[bool, typer.Option(help="Small shapes instead of the paper's; always on a CPU.")] = False,
) -> None:
    """Measure the scan, the convolution and the distillation loss at the paper's shapes, beside installed rivals."""
    import json

    import torch

    from hybridize.bench.cases import KernelShape
    from hybridize.bench.kernels import DEFAULT_SHAPES, KERNEL_OPS, kernels_table, measure_kernels
    from hybridize.bench.lengths import LENGTHS, measure_lengths
    from hybridize.bench.loss import loss_table, measure_loss
    from hybridize.cli.options import check_new_file
    from hybridize.files import write_whole
    from hybridize.spec.base import choose

    names = [choose("--op", name, [*KERNEL_OPS, _LOSS]) for name in op or [*KERNEL_OPS, _LOSS]]
    for file in (out, plot):
        if file is not None:
            check_new_file(file)
    small = small or not torch.cuda.is_available()
    shapes = (KernelShape(batch=1, **_SMALL), KernelShape(batch=4, **_SMALL)) if small else DEFAULT_SHAPES
    records: list[dict[str, Any]] = []
    scans = [name for name in names if name != _LOSS]
    if scans:
        records += measure_kernels(ops=scans, shapes=shapes, repeats=repeats)
        typer.echo(kernels_table(records))
    if _LOSS in names:
        losses = measure_loss(repeats=max(1, repeats // 6), **(_SMALL_LOSS if small else {}))
        typer.echo(loss_table(losses))
        records += losses
    if plot is not None:
        from hybridize.report.plots import length_chart

        lengths = measure_lengths(lengths=LENGTHS[:3] if small else LENGTHS, shape=shapes[0], repeats=repeats)
        write_whole(plot, length_chart(lengths))
        records += lengths
    if out is not None:
        write_whole(out, json.dumps(records, indent=1))


@bench.command()
def serve(
    out: Annotated[
        Path | None,
        typer.Option(
            help="A file of JSON lines to add records to; what is in it is not measured again. By default "
            "serving.jsonl, with --run in that folder."
        ),
    ] = None,
    run_folder: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Output folder of `hybridize run`: its teacher and each layout of its judged models, for its report.",
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Folder or name on the hub, of which the config is read; or a shape: apriel-15b.")
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="name=word, a letter per layer; am*25 is am 25 times. Repeatable. By default the paper's."),
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help="Tokens read and written, e.g. 1k:8k. Repeatable. By default 1:16k, 1k:8k and 8k:16k."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Measure this model (teacher, or a name) and show what there is of the others. Repeatable."),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Run each scenario in full, for many minutes, instead of sampling its steps."),
    ] = False,
    repeats: Annotated[int, typer.Option(help="Measurements of each point; the median counts.")] = 3,
    steps: Annotated[int, typer.Option(help="Decode steps of each measurement.")] = 32,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU's memory for vLLM.")] = 0.9,
    max_sequences: Annotated[
        int | None, typer.Option(help="No more than so many at a time. By default all that fit.")
    ] = None,
    state_dtype: Annotated[str, typer.Option(help="Of the recurrences' states: float32 or bfloat16.")] = "float32",
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a step. By default vLLM's own, on a large GPU 16384.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Minutes after which a model is given up.")] = 30.0,
    small: Annotated[bool, typer.Option("--small", help="A pocket shape and short scenarios, for a CPU.")] = False,
) -> None:
    """Measure teacher and hybrids in vLLM, with random weights: sequences held, decode steps, tokens per second."""
    from hybridize.bench.scenarios import SCENARIOS, SMALL_SCENARIOS, read_scenarios
    from hybridize.bench.serving import measure_serving, serving_table
    from hybridize.bench.serving_records import SERVING_FILE
    from hybridize.spec.base import choose

    if run_folder is None:
        known = _given_models(teacher, layout, small, state_dtype)
    elif teacher or layout:
        raise ValueError("--run: it says the teacher and the layouts; leave out --teacher and --layout")
    else:
        known = _models_of_run(run_folder, state_dtype)
    names = [choose("--only", name, known) for name in only or known]
    rest = [name for name in known if name not in names]
    records = measure_serving(
        [known[name] for name in names + rest],
        read_scenarios(scenario or []) or (SMALL_SCENARIOS if small else SCENARIOS),
        out or (run_folder or Path()) / SERVING_FILE,
        only=names,
        whole=whole,
        repeats=repeats,
        steps=min(steps, 8) if small else steps,
        utilization=gpu_memory_utilization,
        max_sequences=max_sequences,
        state_dtype=state_dtype,
        step_tokens=max_num_batched_tokens,
        timeout_seconds=60 * timeout,
        on_progress=lambda line: typer.echo(line, err=True),
    )
    typer.echo(serving_table(records))
    if any("error" in record for record in records):
        raise typer.Exit(1)


def _given_models(
    teacher: str | None, layout: list[str] | None, small: bool, state_dtype: str
) -> dict[str, "ServedModel"]:
    """The teacher and the layouts that were asked for, by name."""
    from hybridize.bench.scenarios import PAPER_LAYOUTS, SMALL_LAYOUTS, read_layouts
    from hybridize.bench.serving import ServedModel
    from hybridize.pipeline.serving_cost import read_serving_teacher, served_shape

    config = read_serving_teacher(teacher or ("pocket" if small else "apriel-15b"))
    layouts = read_layouts(layout or [], SMALL_LAYOUTS if small else PAPER_LAYOUTS, config["num_hidden_layers"])
    return {
        name: ServedModel(name, word, config, served_shape(config, word, state_dtype=state_dtype, place="--layout"))
        for name, word in layouts.items()
    }


def _models_of_run(run_folder: Path, state_dtype: str) -> dict[str, "ServedModel"]:
    """The teacher and the layouts of a run's judged models, by name; what is left out goes to standard error."""
    from hybridize.pipeline.served import served_models

    models, notes = served_models(run_folder, state_dtype)
    for note in notes:
        typer.echo(note, err=True)
    return {model.name: model for model in models}

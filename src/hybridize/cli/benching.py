"""Verbs that measure code rather than models: `bench kernels`."""

from pathlib import Path
from typing import Annotated, Any

import typer

bench = typer.Typer(name="bench", help="Measure kernels beside rivals and the hardware's floor.", no_args_is_help=True)

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

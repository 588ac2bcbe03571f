"""Verbs between our checkpoints and those of others: import, export."""

from pathlib import Path
from typing import Annotated

import typer

APRIEL = "apriel-h1"
VLLM = "vllm"


def import_(
    source: Annotated[str, typer.Argument(help="Folder of the checkpoint, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    form: Annotated[str, typer.Option("--from", help="Whose format it is: apriel-h1.")] = APRIEL,
) -> None:
    """Make one of our hybrids of a released checkpoint in another format, bit for bit."""
    from hybridize.models import import_apriel
    from hybridize.pipeline.artifacts import writing
    from hybridize.pipeline.progress import Reporter
    from hybridize.spec.base import choose

    choose("--from", form, (APRIEL,))
    with writing(out), Reporter().bar("importing") as advance:
        made = import_apriel(_folder(source), out, on_progress=advance)
    typer.echo(f"{out}: layout {made['layout']}, {made['num_tensors']} tensors, {made['num_bytes'] / 1e9:,.2f} GB")
    for name, value in made["lacking"].items():
        typer.echo(f"config.json leaves {name} to its class's default, {value}; check it")


def export(
    source: Annotated[Path, typer.Argument(help="Folder of a hybrid.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    form: Annotated[
        str,
        typer.Option(
            "--to",
            help="Whose format to write: vllm, which is what fits of granite-hybrid and qwen3.5, both served by vLLM "
            "without the plugin; or apriel-h1.",
        ),
    ] = VLLM,
) -> None:
    """Write a hybrid in another format, if its layers fit there."""
    from hybridize.models import export_apriel, export_native
    from hybridize.models.exports import FORMATS
    from hybridize.pipeline.artifacts import writing
    from hybridize.pipeline.progress import Reporter
    from hybridize.spec.base import choose

    choose("--to", form, (VLLM, *FORMATS, APRIEL))
    with writing(out), Reporter().bar("exporting") as advance:
        if form == APRIEL:
            made = export_apriel(source, out, on_progress=advance)
        else:
            made = export_native(source, out, None if form == VLLM else form, on_progress=advance)
    typer.echo(f"{out}: layout {made['layout']}, {made['num_tensors']} tensors, {made['num_bytes'] / 1e9:,.2f} GB")
    if made.get("num_halved"):
        typer.echo(f"{made['num_halved']} step-size biases are halved: that format's code adds them twice")
    if "architecture" in made:
        added = made["num_added"] / (made["num_parameters"] - made["num_added"])
        typer.echo(f"it is a {made['architecture']}, with {added:.1%} more parameters than the hybrid")
        for note in made["notes"]:
            typer.echo(note)


def _folder(source: str) -> Path:
    """A folder as it is; a checkpoint on the hub is fetched first."""
    if Path(source).exists() or source.startswith((".", "/")) or source.count("/") != 1:
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{source}: there is no such folder, and as the name of a hub repository it cannot be fetched ({reason}); "
            "check the path"
        ) from None

"""Verbs on the way to a hybrid: rank, convert, merge."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from hybridize.cli.options import (
    DataOption,
    InitOption,
    MixerOption,
    SeedOption,
    SetOption,
    TeacherArgument,
    check_new_file,
    make_stage,
    model_input,
    read_mixer,
    run_alone,
)


def rank(
    teacher: TeacherArgument,
    out: Annotated[Path, typer.Option(help="The ranking file to write.")],
    method: Annotated[
        str, typer.Option(help="mmr (the paper's), loo, kl, window, perplexity, or the controls uniform and random.")
    ] = "mmr",
    scores: Annotated[
        Path | None, typer.Option("--import", help="Take published scores: a CSV of layer x task, baseline row -1.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="A hybrid whose remaining attention layers to rank.")] = None,
    mixer: MixerOption = "mamba1",
    init: InitOption = "aligned",
    steps: Annotated[int, typer.Option(help="Training steps per layer.")] = 100,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step.")] = 16384,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a packed row.")] = 16384,
    learning_rate: Annotated[float, typer.Option(help="Of the swapped mixer.")] = 1e-3,
    data: DataOption = None,
    seed: SeedOption = 0,
    settings: SetOption = None,
) -> None:
    """Rank a model's attention layers, least important first, with the controls beside it."""
    from hybridize.files import write_whole
    from hybridize.pipeline.artifacts import writing
    from hybridize.pipeline.stages import RANKING_FILE

    check_new_file(out)
    stage = make_stage(
        "rank",
        settings,
        model="model" if model else "teacher",
        method="import" if scores else method,
        scores=str(scores) if scores else None,
        mixer=read_mixer(mixer),
        init=init,
        steps=steps,
        tokens_per_step=tokens_per_step,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        seed=seed,
    )
    work = out.parent / f".{out.name}.work"
    artifact = run_alone(stage, teacher, data, work, {"model": model_input(model)} if model else None)
    with writing(out):
        write_whole(out, (artifact.folder / RANKING_FILE).read_text())
    shutil.rmtree(work, ignore_errors=True)
    typer.echo(f"ranking: {out}")


def convert(
    model: Annotated[str, typer.Argument(help="Folder of the teacher, or its name on the hub; or a hybrid's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    layers: Annotated[str | None, typer.Option(help="Layers to replace, e.g. 3,5,6; or none.")] = None,
    ranking: Annotated[Path | None, typer.Option(help="A ranking file that decides instead.")] = None,
    num: Annotated[int | None, typer.Option(help="How many layers, with --ranking.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Instead, what each layer is to be, one letter a layer: a attention, m mamba1, 2 mamba2, "
            "g gated_delta_net, k kimi_delta_attention, s sliding_window, i identity."
        ),
    ] = None,
    search: Annotated[
        Path | None,
        typer.Option(help="Instead, a file of `hybridize search --out`: its layout, with its sizes."),
    ] = None,
    mixer: Annotated[
        str | None, typer.Option(help="What replaces attention, as for `rank`: mamba1 (the paper's) by default.")
    ] = None,
    init: InitOption = "aligned",
    explain: Annotated[bool, typer.Option(help="Print where every tensor comes from.")] = False,
    seed: SeedOption = 0,
) -> None:
    """Replace attention layers by mixers that start from the attention's own weights."""
    from hybridize.models import check_output, layout_of, load_model, save_hybrid
    from hybridize.pipeline.artifacts import writing
    from hybridize.pipeline.job import load_tokenizer
    from hybridize.pipeline.progress import quiet_libraries
    from hybridize.spec import LayoutSpec
    from hybridize.spec.base import choose
    from hybridize.transfer import INITS
    from hybridize.transfer import convert as convert_model

    quiet_libraries()
    choose("--init", init, INITS)
    spec = read_mixer(mixer or "mamba1")
    check_output(out)
    if layout is not None and search is not None:
        raise ValueError("--search: --layout says what every layer becomes as well; give one of them")
    given = "--layout" if search is None else "--search"
    if mixer is not None and (layout is not None or search is not None):
        raise ValueError(f"--mixer: {given} says what every layer becomes; leave out --mixer")
    whole = None if layout is None else LayoutSpec.read(layout, place="--layout")
    if search is not None:
        from hybridize.importance import load_search

        found = load_search(search)
        whole, searched = found.layout, found.target.get("init", init)
        if searched != init:
            raise ValueError(f"--init: it is {init}, but {search} goes by rankings with {searched}; give that")
    if whole is None:
        chosen, num_ranked = _parse_layers(layers, ranking, num)
    elif layers is not None or ranking is not None or num is not None:
        raise ValueError(f"{given}: it says what every layer becomes; leave out --layers, --ranking and --num")
    else:
        chosen, num_ranked = (), None
    source = load_model(model).requires_grad_(False)
    num_layers = source.config.num_hidden_layers
    if num_ranked not in (None, num_layers):
        raise ValueError(
            f"--ranking: {ranking} ranks a model of {num_ranked} layers, but {model} has {num_layers}; give its own"
        )
    if search is not None and whole is not None and len(whole.layers) != num_layers:
        raise ValueError(f"--search: its layout has {len(whole.layers)} layers, but {model} has {num_layers}")
    if whole is None:
        whole = layout_of(source.config).with_replaced(chosen, spec, "--layers")
    hybrid, plan = convert_model(source, whole, init, seed, share=True)
    tokenizer = load_tokenizer(model)
    with writing(out):
        save_hybrid(hybrid, tokenizer, out)
    typer.echo(str(plan) if explain else f"{out}: layout {plan.layout}, init {init}; --explain lists every tensor")


def merge(
    models: Annotated[list[Path], typer.Argument(help="Folders of two or more models of one layout.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    method: Annotated[str, typer.Option(help="linear, slerp or ties.")] = "linear",
    weights: Annotated[str | None, typer.Option(help="Of each model, e.g. 0.7,0.3; by default equal.")] = None,
    base: Annotated[Path | None, typer.Option(help="The model that all started from (ties).")] = None,
    density: Annotated[float, typer.Option(help="Share of each difference that ties keeps.")] = 0.2,
) -> None:
    """Merge models of one layout into one, tensor by tensor."""
    from hybridize.merging import merge as merge_models
    from hybridize.pipeline.artifacts import writing
    from hybridize.pipeline.progress import Reporter
    from hybridize.spec.base import choose

    choose("--method", method, ("linear", "slerp", "ties"))
    try:
        shares = tuple(float(part) for part in weights.split(",")) if weights else None
    except ValueError:
        raise ValueError(f"--weights: {weights!r} is no list of numbers; write e.g. 0.7,0.3") from None
    with writing(out), Reporter().bar("merging") as advance:
        stats = merge_models(
            models, out, method=method, weights=shares, base=base, density=density, on_progress=advance
        )
    typer.echo(f"{out}: {method} of {len(models)} models, {stats['num_parameters'] / 1e6:,.1f}M parameters")


def _parse_layers(layers: str | None, ranking: Path | None, num: int | None) -> tuple[tuple[int, ...], int | None]:
    """The layers to replace, and of a ranking, how many layers its model has."""
    if (layers is None) == (ranking is None):
        raise ValueError(
            "convert: say which layers, by --layers 3,5,6 (or none), by --ranking FILE --num N, or by --layout"
        )
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

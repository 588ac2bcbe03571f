"""Arguments and options that several verbs share, and what turns them into specs."""

from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
TeacherArgument = Annotated[str, typer.Argument(help="Folder of the teacher, or its name on the hub.")]
OutArgument = Annotated[Path, typer.Argument(help="Folder to write; a killed call goes on when called again.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="What to read: chats as JSON lines or Parquet, a dataset's name on the hub, or world:1,2 for levels of "
        "the built-in reasoning world (the default)."
    ),
]
MixerOption = Annotated[
    str,
    typer.Option(
        help="What replaces attention: mamba1 (the paper's), mamba2, gated_delta_net, kimi_delta_attention, "
        "sliding_window or identity; with sizes, e.g. '{type: mamba1, state_size: 8}'."
    ),
]
InitOption = Annotated[
    str,
    typer.Option(help="How a mixer starts: aligned, neutral, attention_gate, published (the paper's MIL) or random."),
]
SeedOption = Annotated[int, typer.Option(help="Of data and random draws.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting of the stage, as in a recipe: --set weight_decay=0.1. Repeatable."),
]


def make_stage(kind: str, settings: list[str] | None = None, /, **fields: Any) -> Any:
    """Build a stage spec from the command line, with errors that name the option."""
    from pydantic import ValidationError

    from hybridize.spec.base import explain
    from hybridize.spec.stages import STAGE_KINDS

    known = STAGE_KINDS[kind].model_fields
    try:
        return STAGE_KINDS[kind].model_validate({"name": kind, **fields, **_read_settings(settings or [])})
    except ValidationError as error:
        raise ValueError(explain(error, kind, known)) from None


def _read_settings(settings: list[str]) -> dict[str, Any]:
    import yaml

    read = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set: {setting!r} is no setting; write e.g. --set weight_decay=0.1")
        try:
            # A number such as 1e-4 is a text in YAML 1.1; pydantic reads it as the number that it is.
            read[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set: the value of {setting!r} cannot be read; write e.g. --set freeze=[mlp]") from None
    return read


def read_data(text: str | None) -> Any:
    """The data that `--data` names."""
    from hybridize.spec.data import FileDataSpec, HubDataSpec, WorldDataSpec

    if text is None or text == "world":
        return WorldDataSpec()
    if text.startswith("world:"):
        try:
            return WorldDataSpec(levels=tuple(int(level) for level in text.removeprefix("world:").split(",")))
        except ValueError:
            raise ValueError(f"--data: {text!r} names no levels; write e.g. world:1,2 (from 1 to 8)") from None
    if Path(text).is_file() or Path(text).suffix in (".jsonl", ".json", ".parquet"):
        return FileDataSpec(path=text)
    return HubDataSpec(dataset=text)


def read_mixer(text: str) -> Any:
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


def check_new_file(out: Path) -> None:
    """Find out that a file cannot be written before the work is done, not after."""
    from hybridize.pipeline.artifacts import writing

    if out.exists():
        raise ValueError(f"{out}: it exists already and nothing is overwritten; remove it or give another name")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.with_name(f".{out.name}.tmp")
        probe.touch()
        probe.unlink()


def model_input(path: Path) -> Any:
    """A model's folder as what a stage reads, whether a stage made it or not.

    Raises:
        ValueError: there is no such folder, or it holds no whole checkpoint.
    """
    from hybridize.pipeline.artifacts import Artifact, fingerprint_model
    from hybridize.pipeline.job import check_checkpoint

    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder; give the folder of a model")
    check_checkpoint(str(path))
    return Artifact(path, {"files": fingerprint_model(path, whole=True)})


def run_alone(stage: Any, teacher: str, data: str | None, out: Path, inputs: dict[str, Any] | None = None) -> Any:
    """Run one stage outside a recipe."""
    from hybridize.pipeline.artifacts import fingerprint_model
    from hybridize.pipeline.job import Job
    from hybridize.pipeline.planning import read_teacher_config
    from hybridize.pipeline.progress import Reporter
    from hybridize.pipeline.runner import run_stage

    if not Path(teacher).is_dir() and teacher.count("/") == 1:
        read_teacher_config(teacher)  # so that the revision is known before anything is identified by it
    job = Job(teacher, read_data(data), Reporter(), dict(inputs or {}))
    return run_stage(stage, job, out, fingerprint_model(teacher))

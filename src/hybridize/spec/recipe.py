"""A recipe: a complete job, from teacher to report, as one YAML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from hybridize.spec.base import Spec, choose, explain
from hybridize.spec.data import DataSpec, FileDataSpec, HubDataSpec, TracesDataSpec, WorldDataSpec
from hybridize.spec.mixers import MIXER_TYPES
from hybridize.spec.stages import (
    MODEL_KINDS,
    STAGE_KINDS,
    TEACHER,
    AnyStage,
    ConvertStage,
    DataStage,
    HarnessStage,
    JudgingStage,
    MergeStage,
    RankStage,
    ScheduleStage,
    SearchStage,
    SftStage,
    StageSpec,
    StopSpec,
    TextStage,
    TracesStage,
    control_name,
    distilled_name,
)


class RecipeSpec(Spec):
    """A job: stages in order, each reading the teacher or earlier stages by name.

    Attributes:
        name: of the job.
        teacher: a folder (starting with `.` or `/`; relative to the recipe) or a model's name on the hub.
        output: folder of the results, relative to the working directory; default `runs/<name>`.
        data: what distillation and ranking train on.
        stages: what to do.
    """

    name: str = Field(min_length=1)
    teacher: str
    output: str | None = None
    data: DataSpec = Field(default_factory=WorldDataSpec)
    stages: tuple[AnyStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        if isinstance(self.data, TracesDataSpec):
            raise ValueError("data: it cannot be the result of a stage, since stages read it; name traces at a stage")
        kinds: dict[str, str] = {}
        for position, stage in enumerate(self.stages):
            place = f"stages[{position}]"
            if stage.name in kinds or stage.name == TEACHER:
                raise ValueError(f"{place}.name: {stage.name!r} is taken; give each stage a name of its own")
            _check_stage(stage, place, kinds)
            kinds[stage.name] = stage.kind
            if isinstance(stage, ScheduleStage):
                kinds |= {distilled_name(stage, count): "distill" for count in stage.layers}
            elif isinstance(stage, SftStage) and stage.teacher_control:
                kinds[control_name(stage)] = "sft"
        self._check_inits()
        return self

    def _check_inits(self) -> None:
        """Raise a `ValueError` if a layout is converted with another init than the one it was searched for."""
        inits = {stage.name: stage.init for stage in self.stages if isinstance(stage, RankStage)}
        rankings = {stage.name: stage.rankings for stage in self.stages if isinstance(stage, SearchStage)}
        for position, stage in enumerate(self.stages):
            if not isinstance(stage, ConvertStage) or not stage.search:
                continue
            for name in rankings.get(stage.search, ()):
                if inits.get(name, stage.init) != stage.init:
                    raise ValueError(
                        f"stages[{position}].init: it is {stage.init}, but {stage.search} goes by {name}, which ranks "
                        f"with {inits[name]}; use {inits[name]} for both"
                    )

    @property
    def output_folder(self) -> Path:
        """Where the results go."""
        return Path(self.output or f"runs/{self.name}")

    def layers_named(self) -> dict[str, tuple[int, ...]]:
        """The explicit layers of each convert stage, by the place to name in an error."""
        return {
            f"recipe.stages[{i}].layers": stage.layers
            for i, stage in enumerate(self.stages)
            if isinstance(stage, ConvertStage) and stage.layers is not None
        }


def _check_stage(stage: StageSpec, place: str, kinds: Mapping[str, str]) -> None:
    """Raise a `ValueError` if a stage refers to what is not there before it."""
    if isinstance(stage, ConvertStage) and stage.ranking:
        _refer(f"{place}.ranking", stage.ranking, [n for n, k in kinds.items() if k == "rank"])
    if isinstance(stage, ConvertStage) and stage.search:
        _refer(f"{place}.search", stage.search, [n for n, k in kinds.items() if k == "search"])
    if isinstance(stage, SearchStage):
        for position, name in enumerate(stage.rankings):
            _refer(f"{place}.rankings[{position}]", name, [n for n, k in kinds.items() if k == "rank"])
    if isinstance(stage, DataStage) and isinstance(stage.data, TracesDataSpec):
        _refer(f"{place}.data.stage", stage.data.stage, [n for n, k in kinds.items() if k == "traces"])
    made = [n for n, k in kinds.items() if k in MODEL_KINDS]
    if isinstance(stage, MergeStage):
        for position, source in enumerate(stage.sources):
            _refer(f"{place}.sources[{position}]", source, made)
        if stage.base is not None:
            _refer(f"{place}.base", stage.base, made)
    elif not isinstance(stage, ScheduleStage):
        takes_teacher = isinstance(stage, (ConvertStage, JudgingStage, RankStage, SftStage, TracesStage))
        for name in stage.models:
            _refer(f"{place}.model", name, [*made, TEACHER] if takes_teacher else made)


def _refer(place: str, name: str, earlier: list[str]) -> None:
    if not earlier:
        raise ValueError(f"{place}: {name!r} is not an earlier stage, and none before it fits; add one first")
    choose(place, name, earlier)


def load_recipe(path: str | Path) -> RecipeSpec:
    """Read a recipe file; relative paths in it come back relative to its folder.

    Raises:
        ValueError: the file is missing or no YAML, or a line for every fault: place, value, remedy.
    """
    path = Path(path)
    try:
        value = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"recipe {path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: is not valid YAML: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"recipe {path}: holds no mapping; start with `name:` and `teacher:`")
    recipe = parse_recipe(value)
    changes: dict[str, Any] = {"teacher": _beside(path, recipe.teacher), "data": _data_beside(path, recipe.data)}
    changes["stages"] = tuple(_stage_beside(path, stage) for stage in recipe.stages)
    return recipe.model_copy(update=changes)


def parse_recipe(value: Mapping[str, Any]) -> RecipeSpec:
    """Build a recipe from plain data.

    Raises:
        ValueError: a line for every fault: place, value, remedy.
    """
    try:
        return RecipeSpec.model_validate(_named(value))
    except ValidationError as error:
        raise ValueError(explain(error, "recipe", _known_keys(), _TAGS)) from None


def _named(value: Mapping[str, Any]) -> dict[str, Any]:
    """Give a stage without a name the name of its kind."""
    stages = value.get("stages")
    if not isinstance(stages, list):
        return dict(value)
    named = [
        {"name": stage["kind"]} | stage if isinstance(stage, dict) and isinstance(stage.get("kind"), str) else stage
        for stage in stages
    ]
    return dict(value) | {"stages": named}


def _beside(recipe: Path, teacher: str) -> str:
    return str(recipe.parent / teacher) if teacher.startswith(".") else teacher


def _data_beside(recipe: Path, data: Any) -> Any:
    if isinstance(data, FileDataSpec):
        return FileDataSpec(path=str(recipe.parent / data.path))
    if isinstance(data, HubDataSpec):
        return data.model_copy(update={"dataset": _beside(recipe, data.dataset)})
    return data


def _stage_beside(recipe: Path, stage: StageSpec) -> StageSpec:
    """A stage with its files found relative to the recipe."""
    changes: dict[str, Any] = {}
    if isinstance(stage, DataStage) and stage.data is not None:
        changes["data"] = _data_beside(recipe, stage.data)
    if isinstance(stage, TextStage):
        changes["text"] = str(recipe.parent / stage.text)
    if isinstance(stage, HarnessStage) and stage.benchmarks:
        changes["benchmarks"] = str(recipe.parent / stage.benchmarks)
    if isinstance(stage, RankStage) and stage.scores:
        changes["scores"] = str(recipe.parent / stage.scores)
    if isinstance(stage, TracesStage) and ":" in stage.verifier:
        changes["verifier"] = str(recipe.parent / stage.verifier)
    if isinstance(stage, ScheduleStage):
        changes["rank"] = tuple(_stage_beside(recipe, inner) for inner in stage.rank)
        changes["fit"] = _stage_beside(recipe, stage.fit) if stage.fit else None
        changes["distill"] = tuple(_stage_beside(recipe, inner) for inner in stage.distill)
    return stage.model_copy(update=changes) if changes else stage


_TAGS = frozenset([*STAGE_KINDS, *MIXER_TYPES, "world", "file", "hub", "traces"])


def _known_keys() -> set[str]:
    kinds: list[type[Spec]] = [
        RecipeSpec,
        WorldDataSpec,
        FileDataSpec,
        HubDataSpec,
        TracesDataSpec,
        StopSpec,
        *STAGE_KINDS.values(),
        *MIXER_TYPES.values(),
    ]
    return {field for kind in kinds for field in kind.model_fields}

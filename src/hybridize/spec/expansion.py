"""From a recipe as written to the plain stages that are run: schedules and one-flag controls are spelled out."""

from typing import Any

from hybridize.spec.recipe import RecipeSpec
from hybridize.spec.stages import (
    TEACHER,
    ConvertStage,
    EvaluateStage,
    MergeStage,
    ScheduleStage,
    SftStage,
    StageSpec,
    ThroughputStage,
    control_name,
    distilled_name,
)


def expand(recipe: RecipeSpec, num_layers: int) -> RecipeSpec:
    """Spell out what stands for several stages.

    A `schedule` becomes its rank, convert, fit, distill, evaluate and throughput stages; an `sft` stage with
    `teacher_control` is followed by the same on the teacher. A recipe without either comes back as it is.

    Args:
        recipe: as written.
        num_layers: of the teacher.

    Raises:
        ValueError: a schedule asks for more layers than there are, or a name is taken.
    """
    stages: list[StageSpec] = []
    stands_for: dict[str, str] = {}
    for position, written in enumerate(recipe.stages):
        stage = _redirect(written, stands_for)
        if isinstance(stage, ScheduleStage):
            stages += _spell_out(stage, num_layers, f"recipe.stages[{position}]")
            for meant, count in zip(stage.layers, stage.counts(num_layers), strict=True):
                stands_for[distilled_name(stage, meant)] = distilled_name(stage, count)
            stands_for[stage.name] = stands_for[distilled_name(stage, stage.layers[-1])]
        elif isinstance(stage, SftStage) and stage.teacher_control:
            stages.append(stage.model_copy(update={"teacher_control": False}))
            control = {"name": control_name(stage), "model": TEACHER, "teacher_control": False}
            stages.append(stage.model_copy(update=control))
        else:
            stages.append(stage)
    if len(stages) == len(recipe.stages):
        return recipe
    written_fields = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    return RecipeSpec.model_validate(written_fields | {"stages": tuple(stages)})


def _spell_out(schedule: ScheduleStage, num_layers: int, place: str) -> list[StageSpec]:
    try:
        counts = schedule.counts(num_layers)
    except ValueError as error:
        raise ValueError(f"{place}.{error}") from None
    stages: list[StageSpec] = []
    model, done, first = TEACHER, 0, True
    for position, count in enumerate(counts):
        if count in counts[position + 1 :]:
            continue  # scaled down, two stages became one
        name = f"{schedule.name}-{count}"
        ranked = schedule.rank[position if len(schedule.rank) > 1 else 0]
        rank = ranked.model_copy(
            update={
                "name": f"{name}-rank",
                "model": model,
                "mixer": schedule.mixer,
                "init": schedule.init,
            }
        )
        stages.append(rank)
        stages.append(
            ConvertStage(
                name=f"{name}-convert",
                model=model,
                ranking=rank.name,
                num_layers=count - done,
                mixer=schedule.mixer,
                init=schedule.init,
                seed=schedule.seed,
            )
        )
        if schedule.fit is not None and first:
            stages.append(schedule.fit.model_copy(update={"name": f"{name}-fit", "model": stages[-1].name}))
        settings = schedule.distill[position if len(schedule.distill) > 1 else 0]
        distill = settings.model_copy(update={"name": distilled_name(schedule, count), "model": stages[-1].name})
        stages.append(distill)
        label = f"{schedule.label}, {count} of {num_layers}" if schedule.label else f"{count} of {num_layers}"
        judging: dict[str, EvaluateStage | ThroughputStage] = {
            f"judge-{i + 1}" if i else "judge": evaluate for i, evaluate in enumerate(schedule.evaluate)
        }
        judging |= {"speed": schedule.throughput} if schedule.throughput else {}
        for suffix, judge in judging.items():
            update = {"name": f"{name}-{suffix}", "model": distill.name, "label": judge.label or label}
            stages.append(judge.model_copy(update=update))
        model, done, first = distill.name, count, False
    return stages


def _redirect(stage: StageSpec, stands_for: dict[str, str]) -> StageSpec:
    """Let a stage that names a schedule name its last model."""
    changes: dict[str, Any] = {}
    model = getattr(stage, "model", None)
    if model in stands_for:
        changes["model"] = stands_for[model]
    if isinstance(stage, MergeStage):
        changes["sources"] = tuple(stands_for.get(name, name) for name in stage.sources)
        if stage.base:
            changes["base"] = stands_for.get(stage.base, stage.base)
    return stage.model_copy(update=changes) if changes else stage

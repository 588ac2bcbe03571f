"""What a recipe will cost, worked out from the recipe and the teacher's config alone; imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.pipeline.sizes import TeacherShape, mixer_parameters
from hybridize.spec.expansion import expand
from hybridize.spec.mixers import MixerSpec
from hybridize.spec.recipe import RecipeSpec
from hybridize.spec.stages import (
    TEACHER,
    ConvertStage,
    DistillStage,
    EvaluateStage,
    FitStage,
    HarnessStage,
    MergeStage,
    OnPolicyStage,
    RankStage,
    ReportStage,
    SearchStage,
    StageSpec,
    TextStage,
    ThroughputStage,
    TracesStage,
    TrainStage,
)

_TOKENS_PER_PROBLEM = 250
"""Prompt and answer of a problem of the reasoning world at a middling level, for estimates."""

_TOKENS_PER_ANSWER = 2000
"""An answer of a large reasoning model, for estimates."""


@dataclass(frozen=True)
class StageCost:
    """An estimate for one stage.

    Attributes:
        name: of the stage.
        what: in words.
        tokens: trained on or generated.
        trained: parameters that get gradients.
        operations: floating-point operations.
        memory: bytes: weights, gradients, optimiser, and what backward needs of the activations of a batch.
    """

    name: str
    what: str
    tokens: int = 0
    trained: int = 0
    operations: float = 0.0
    memory: float = 0.0


@dataclass(frozen=True)
class _Model:
    """A model that a stage makes: how many layers are which mixer."""

    mixers: tuple[MixerSpec, ...] = ()


def plan_recipe(recipe: RecipeSpec, shape: TeacherShape) -> list[StageCost]:
    """The stages and their cost, schedules spelled out.

    Operations: 2 per parameter and token forward, 4 backward (arXiv 2001.08361), attention scores left out. Memory: a
    trained parameter takes 16 bytes (weight, gradient and AdamW's two moments in fp32), another one 4 on the student
    and 2 on the teacher; activations are reckoned in bf16.
    """
    models: dict[str, _Model] = {TEACHER: _Model()}
    costs = []
    for stage in expand(recipe, shape.num_layers).stages:
        if isinstance(stage, ConvertStage):
            before = () if stage.layout is not None else models[stage.model].mixers
            models[stage.name] = _Model(before + (_searched(stage, recipe, shape) or stage.made))
        elif isinstance(stage, MergeStage):
            models[stage.name] = models[stage.sources[0]]
        elif isinstance(stage, TrainStage):
            models[stage.name] = models[stage.model]
        costs.append(_cost(stage, shape, models))
    return costs


def _searched(stage: ConvertStage, recipe: RecipeSpec, shape: TeacherShape) -> tuple[MixerSpec, ...]:
    """What a search may find: as many layers as it is asked for, else all, of the largest mixer that it may take."""
    found = next(
        (other for other in recipe.stages if isinstance(other, SearchStage) and other.name == stage.search), None
    )
    if found is None:
        return ()
    mixers = [other.mixer for other in recipe.stages if isinstance(other, RankStage) and other.name in found.rankings]
    largest = max(mixers, key=lambda mixer: mixer_parameters(mixer, shape))
    return (largest,) * (found.num_layers or shape.num_layers)


def _cost(stage: StageSpec, shape: TeacherShape, models: Mapping[str, _Model]) -> StageCost:
    forward = 2.0 * shape.active_parameters
    frozen = 2.0 * shape.parameters
    match stage:
        case RankStage():
            return _rank_cost(stage, shape, len(models[stage.model].mixers))
        case ConvertStage():
            made = len(models[stage.name].mixers)
            most = "up to " if stage.search else ""
            text = f"{most}{made} of {shape.num_layers} layers to {stage.made_of}, init {stage.init}"
            return StageCost(stage.name, text, memory=2 * frozen)
        case SearchStage():
            return StageCost(stage.name, f"a mixer for each layer by {', '.join(stage.rankings)}; no training")
        case TrainStage():
            return _training_cost(stage, shape, models[stage.model])
        case MergeStage():
            return StageCost(stage.name, f"{stage.method} of {', '.join(stage.sources)}")
        case TracesStage():
            answers = stage.num_prompts * stage.samples_per_prompt
            tokens = answers * min(stage.max_new_tokens, _TOKENS_PER_ANSWER)
            text = f"{answers:,} answers to {stage.num_prompts:,} prompts"
            return StageCost(stage.name, text, tokens, 0, tokens * forward, frozen)
        case EvaluateStage():
            problems = stage.problems_per_task * len(stage.tasks)
            tokens = problems * stage.samples * _TOKENS_PER_PROBLEM
            text = f"{stage.model}: {problems} problems, {stage.difficulty}"
            return StageCost(stage.name, text, tokens, 0, tokens * forward, frozen)
        case TextStage():
            tokens = stage.max_tokens
            return StageCost(stage.name, f"{stage.model}: {stage.text}", tokens, 0, 2 * tokens * forward, 2 * frozen)
        case ThroughputStage():
            tokens = (stage.repeats + 1) * stage.batch_size * (stage.prompt_tokens + stage.new_tokens)
            text = f"{stage.model}: {stage.batch_size} x {stage.new_tokens} new tokens"
            return StageCost(stage.name, text, tokens, 0, tokens * forward, frozen)
        case HarnessStage():
            return StageCost(stage.name, f"{stage.model}: {', '.join(stage.tasks)}", memory=frozen)
        case ReportStage():
            return StageCost(stage.name, "one HTML page and its pictures")
    raise AssertionError(f"no cost for {type(stage).__name__}")


def _rank_cost(stage: RankStage, shape: TeacherShape, num_mixers: int) -> StageCost:
    """What a ranking costs: `hybridize.importance.rank_cost` says how often a layer runs."""
    from hybridize.importance import METHODS, rank_cost

    if METHODS[stage.method].is_control:
        return StageCost(stage.name, f"{stage.method} control, no training")
    if stage.method == "import":
        return StageCost(stage.name, f"scores of {stage.scores}")
    num_layers = shape.num_layers - num_mixers
    cost = rank_cost(shape.num_layers, stage, range(num_layers))
    one_layer = 2.0 * shape.active_parameters / shape.num_layers
    weights = 2.0 * shape.parameters
    scoring = stage.heldout_rows * stage.sequence_length * cost["scoring_passes"] * one_layer
    if stage.method not in ("mmr", "kl"):
        scoring += cost.get("answers", 0) * _TOKENS_PER_PROBLEM * one_layer * shape.num_layers
        return StageCost(stage.name, f"{stage.method}, {num_layers} layers", 0, 0, scoring, weights)
    trained = mixer_parameters(stage.mixer, shape)
    if stage.method == "mmr" and stage.sweep == "plain":
        trained = shape.parameters
    backward = 2.0 * stage.tokens_per_step * stage.steps * num_layers * shape.num_layers / 2
    operations = (stage.tokens_per_step * cost["layer_passes"] + backward) * one_layer + scoring
    activations = _activations(shape, stage.tokens_per_step, whole=not stage.gradient_checkpointing)
    return StageCost(
        stage.name,
        f"{stage.method}: {stage.steps} steps for each of {num_layers} layers",
        cost["tokens"],
        trained,
        operations,
        2 * weights + 16.0 * trained + activations,
    )


def _training_cost(stage: TrainStage, shape: TeacherShape, model: _Model) -> StageCost:
    forward = 2.0 * shape.active_parameters
    mixers = sum(mixer_parameters(mixer, shape) for mixer in model.mixers)
    total = shape.parameters - len(model.mixers) * shape.attention_parameters + mixers
    trained = mixers if stage.train == "mixers" else total
    tokens, batch = stage.steps * stage.tokens_per_step, stage.rows_per_batch * stage.sequence_length
    match stage:
        case OnPolicyStage():
            tokens = stage.steps * stage.prompts_per_step * min(stage.max_new_tokens, _TOKENS_PER_ANSWER)
            batch = stage.rows_per_batch * stage.max_new_tokens
            text, per_token = f"{stage.loss} on its own answers, {stage.steps} steps", 5 * forward
        case FitStage():
            text, per_token = f"each mixer to its attention, {stage.steps} steps", forward + 6.0 * mixers
        case DistillStage():
            text, per_token = f"{stage.loss}, {stage.steps} steps of {stage.tokens_per_step:,} tokens", 4 * forward
        case _:
            text, per_token = f"completions, {stage.steps} steps of {stage.tokens_per_step:,} tokens", 3 * forward
    teacher = 0.0 if stage.kind == "sft" else 2.0 * shape.parameters  # type: ignore[attr-defined]
    memory = 16.0 * trained + 4.0 * (total - trained) + teacher
    memory += _activations(shape, batch, whole=not stage.gradient_checkpointing)
    return StageCost(stage.name, text, tokens, trained, tokens * per_token, memory)


def _activations(shape: TeacherShape, tokens: int, *, whole: bool) -> float:
    """Bytes that backward needs of a batch's activations: those of all layers, or each layer's input and one layer's.

    A layer keeps about 8 tensors as wide as the residual stream and 3 as wide as the MLP, in bf16.
    """
    hidden = shape.geometry.hidden_size
    layer = 2.0 * tokens * (8 * hidden + 3 * shape.intermediate_size)
    return shape.num_layers * layer if whole else layer + 2.0 * tokens * hidden * shape.num_layers


def read_teacher_config(teacher: str) -> dict[str, Any]:
    """A teacher's config.json; that of a model on the hub is fetched.

    Raises:
        ValueError: the folder is missing, or there is no readable config.json.
    """
    folder = Path(teacher)
    if not folder.exists() and not teacher.startswith((".", "/")) and teacher.count("/") == 1:
        return _fetch_config(teacher)
    file = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"teacher: there is no folder {teacher}; check the path, or give a model's name on the hub")
    try:
        config = json.loads(file.read_text())
        TeacherShape.of(config)
    except OSError:
        raise ValueError(
            f"teacher: {teacher} has no config.json; give the folder of a Hugging Face checkpoint"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: is not valid JSON ({error}); restore it") from None
    except KeyError as missing:
        raise ValueError(f"{file}: has no {missing}; a dense decoder's config is needed") from None
    return config


def _fetch_config(name: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        config = PreTrainedConfig.get_config_dict(name)[0]
        TeacherShape.of(config)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"teacher: {name} is no folder, and on the hub its config does not load ({reason})") from None
    except KeyError as missing:
        raise ValueError(f"teacher: {name}'s config has no {missing}; a dense decoder's is needed") from None
    return dict(config)

"""What a recipe will cost, worked out from the recipe and the teacher's config alone; imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.spec.mixers import AttentionGeometry, AttentionSpec, Mamba1Spec
from hybridize.spec.recipe import RecipeSpec
from hybridize.spec.stages import ConvertStage, DistillStage, EvaluateStage, RankStage, ReportStage, StageSpec

_TOKENS_PER_PROBLEM = 250
"""Prompt and answer of a problem of the reasoning world at a middling level, for estimates."""


@dataclass(frozen=True)
class TeacherShape:
    """Sizes of a dense decoder, for counting parameters and operations.

    Attributes:
        geometry: of its attention.
        num_layers: decoder layers.
        intermediate_size: width of the gated MLP.
        vocab_size: rows of the embedding.
        tied: whether input and output embedding are one.
    """

    geometry: AttentionGeometry
    num_layers: int
    intermediate_size: int
    vocab_size: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TeacherShape":
        """Read a config.json."""
        heads = config["num_attention_heads"]
        return cls(
            AttentionGeometry(
                hidden_size=config["hidden_size"],
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ),
            config["num_hidden_layers"],
            config["intermediate_size"],
            config["vocab_size"],
            config.get("tie_word_embeddings", False),
        )

    @property
    def attention_parameters(self) -> int:
        """Of the q, k, v and o projections of one layer."""
        g = self.geometry
        return 2 * g.hidden_size * g.head_dim * (g.num_heads + g.num_kv_heads)

    @property
    def layer_parameters(self) -> int:
        """Of one layer: attention, gated MLP, two norms."""
        hidden = self.geometry.hidden_size
        return self.attention_parameters + 3 * hidden * self.intermediate_size + 2 * hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.geometry.hidden_size
        return self.num_layers * self.layer_parameters + embeddings + self.geometry.hidden_size

    @property
    def active_parameters(self) -> int:
        """What a token is multiplied with: all but the input embedding."""
        head = self.vocab_size * self.geometry.hidden_size
        return self.num_layers * self.layer_parameters + head


def mixer_parameters(spec: AttentionSpec | Mamba1Spec, shape: TeacherShape) -> int:
    """Parameters of one mixer in the place of the teacher's attention."""
    if isinstance(spec, AttentionSpec):
        return shape.attention_parameters
    spec = spec.resolve(shape.geometry)
    assert spec.d_inner
    assert spec.d_xb
    assert spec.dt_rank
    hidden, inner = shape.geometry.hidden_size, spec.d_inner
    projections = hidden * (3 * inner + 2 * spec.d_xb + spec.dt_rank) + spec.dt_rank * inner
    return projections + inner * (spec.conv_kernel + spec.state_size + 3)


@dataclass(frozen=True)
class StageCost:
    """An estimate for one stage.

    Attributes:
        name: of the stage.
        what: in words.
        tokens: trained on or generated.
        trained: parameters that get gradients.
        operations: floating-point operations.
    """

    name: str
    what: str
    tokens: int = 0
    trained: int = 0
    operations: float = 0.0


def plan_recipe(recipe: RecipeSpec, shape: TeacherShape) -> list[StageCost]:
    """The stages and their cost.

    Operations: 2 per parameter and token forward, 4 backward (arXiv 2001.08361), attention scores left out.
    """
    replaced: dict[str, tuple[int, AttentionSpec | Mamba1Spec]] = {}
    costs = []
    for stage in recipe.stages:
        if isinstance(stage, ConvertStage):
            replaced[stage.name] = (len(stage.layers or ()) or stage.num_layers or 0, stage.mixer)
        elif isinstance(stage, DistillStage):
            replaced[stage.name] = replaced[stage.model]
        costs.append(_cost(stage, shape, replaced))
    return costs


def _cost(
    stage: StageSpec, shape: TeacherShape, replaced: Mapping[str, tuple[int, AttentionSpec | Mamba1Spec]]
) -> StageCost:
    forward = 2.0 * shape.active_parameters
    match stage:
        case RankStage(method="mmr"):
            tokens = stage.steps * stage.tokens_per_step
            # The teacher sees each token once; layer l trains through the layers above it: half of them on average.
            operations = tokens * (forward + shape.num_layers * forward)
            return StageCost(
                stage.name,
                f"mmr: {stage.steps} steps for each of {shape.num_layers} layers",
                tokens * shape.num_layers,
                mixer_parameters(stage.mixer, shape),
                operations,
            )
        case RankStage():
            return StageCost(stage.name, f"{stage.method} control, no training")
        case ConvertStage():
            count, mixer = replaced[stage.name]
            return StageCost(stage.name, f"{count} of {shape.num_layers} layers to {mixer.type}, init {stage.init}")
        case DistillStage():
            count, mixer = replaced[stage.model]
            mixers = count * mixer_parameters(mixer, shape)
            total = shape.parameters - count * shape.attention_parameters + mixers
            tokens = stage.steps * stage.tokens_per_step
            return StageCost(
                stage.name,
                f"{stage.loss}, {stage.steps} steps of {stage.tokens_per_step:,} tokens",
                tokens,
                mixers if stage.train == "mixers" else total,
                tokens * 4 * forward,
            )
        case EvaluateStage():
            problems = stage.problems_per_task * len(stage.tasks)
            tokens = problems * _TOKENS_PER_PROBLEM
            return StageCost(stage.name, f"{stage.model}: {problems} problems", tokens, 0, tokens * forward)
        case ReportStage():
            return StageCost(stage.name, "one HTML page and its pictures")
    raise AssertionError(f"no cost for {type(stage).__name__}")


def read_teacher_config(teacher: str) -> dict[str, Any] | None:
    """A local teacher's config.json; None for a model on the hub.

    Raises:
        ValueError: the folder is missing, or holds no readable config.json.
    """
    folder = Path(teacher)
    if not folder.exists() and not teacher.startswith((".", "/")) and teacher.count("/") == 1:
        return None
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

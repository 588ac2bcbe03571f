"""The judged models of a run as layouts for vLLM to serve, and what was measured of them there.

A run that was brought here from another machine may have no weights, and its teacher may be gone: a model's config.json
and the stages' manifests are enough.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.bench.prediction import ServedShape
from hybridize.bench.scenarios import TEACHER
from hybridize.bench.serving import ServedModel
from hybridize.bench.serving_records import SERVING_FILE, Speed, read_speeds
from hybridize.pipeline.artifacts import MANIFEST
from hybridize.pipeline.planning import read_teacher_config
from hybridize.pipeline.runner import RECIPE_FILE
from hybridize.pipeline.serving_cost import LayerSizes, layout_shape
from hybridize.pipeline.sizes import TeacherShape
from hybridize.spec.expansion import expand
from hybridize.spec.layout import LayoutSpec
from hybridize.spec.mixers import AttentionSpec, MixerSpec, parse_mixer
from hybridize.spec.recipe import RecipeSpec, parse_recipe
from hybridize.spec.stages import MODEL_KINDS, ConvertStage, EvaluateStage, HarnessStage


@dataclass(frozen=True)
class JudgedLayouts:
    """What can be served of a run.

    Attributes:
        config: the teacher's.
        layouts: by model, in the order in which they are judged; the teacher first, judged or not.
        notes: judged models whose layout is not known, in words.
    """

    config: Mapping[str, Any]
    layouts: Mapping[str, LayoutSpec]
    notes: tuple[str, ...] = ()


def read_run(run: Path) -> tuple[RecipeSpec, int]:
    """The recipe of a run folder, as its author wrote it, and the teacher's number of layers.

    Raises:
        ValueError: the folder holds no run, or its recipe is damaged.
    """
    file = run / RECIPE_FILE
    if not file.is_file():
        raise ValueError(
            f"{run}: it holds no {RECIPE_FILE}, so it is no run; give the output folder of `hybridize run`"
        )
    try:
        facts = json.loads(file.read_text())
        written, num_layers = parse_recipe(facts["recipe"]), int(facts["num_layers"])
        expand(written, num_layers)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: it is damaged ({error}); run the recipe again") from None
    return written, num_layers


def served_models(run: Path, state_dtype: str = "float32") -> tuple[list[ServedModel], tuple[str, ...]]:
    """The teacher and each layout of a run's judged models, once, by the name of the first model that has it.

    Args:
        run: the folder.
        state_dtype: in which the recurrences' states are kept.

    Returns:
        The models, and what was left out, in words.

    Raises:
        ValueError: the folder holds no run, nothing in it was judged, or nothing in it says the model's shape.
    """
    written, num_layers = read_run(run)
    recipe = expand(written, num_layers)
    manifests = {stage.name: _read_manifest(run / stage.name) for stage in recipe.stages}
    found = judged_layouts(recipe, num_layers, run, {name: m for name, m in manifests.items() if m is not None})
    if len(found.layouts) == 1:
        raise ValueError(
            f"--run: no model of {run} was judged yet whose layout is known; run its recipe, or use --layout"
        )
    sizes = LayerSizes(found.config, state_dtype=state_dtype)
    models: dict[Any, ServedModel] = {}
    for name, layout in found.layouts.items():
        layers = layout.resolve(sizes.teacher.geometry, name).layers
        key = (str(layout), tuple(map(sizes.of, layers)))
        if key not in models:
            shape = layout_shape(found.config, layout, state_dtype=state_dtype, place=name)
            models[key] = ServedModel(name, str(layout), found.config, shape, layout)
    return list(models.values()), found.notes


def judged_layouts(
    recipe: RecipeSpec, num_layers: int, run: Path, manifests: Mapping[str, Mapping[str, Any]]
) -> JudgedLayouts:
    """The layouts of the models that were judged by what they answer.

    Args:
        recipe: expanded.
        num_layers: of the teacher.
        run: the folder.
        manifests: of the stages that have finished, by name.

    Raises:
        ValueError: nothing says the shape of the models.
    """
    stages: dict[str, Any] = {stage.name: stage for stage in recipe.stages}
    reader = _Layouts(stages, num_layers, run, manifests)
    layouts, notes = {TEACHER: LayoutSpec(layers=(AttentionSpec(),) * num_layers)}, []
    judged = [s for s in recipe.stages if isinstance(s, EvaluateStage | HarnessStage) and _judged(s, manifests)]
    for model in dict.fromkeys(stage.model for stage in judged):
        layout = layouts.get(model) or reader.of(model)
        if layout is None:
            notes.append(f"{model}: neither a config.json nor a conversion in {run} says its layout; left out")
        else:
            layouts[model] = layout
    return JudgedLayouts(reader.teacher_config(recipe.teacher), layouts, tuple(notes))


def _judged(stage: EvaluateStage | HarnessStage, manifests: Mapping[str, Mapping[str, Any]]) -> bool:
    return stage.name in manifests and manifests[stage.name]["spec"].get("model") == stage.model


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """A stage's manifest, whether or not the files that it lists are there; None if there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest if isinstance(manifest["spec"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Layouts:
    """What a run's folder says of its models: by their configs, or by the manifests of their conversions."""

    def __init__(
        self, stages: Mapping[str, Any], num_layers: int, run: Path, manifests: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.stages, self.num_layers, self.run, self.manifests = stages, num_layers, run, manifests

    def of(self, model: str) -> LayoutSpec | None:
        """A model's layout; None if nothing says it."""
        if model == TEACHER:
            return LayoutSpec(layers=(AttentionSpec(),) * self.num_layers)
        stage, config = self.stages[model], self._config(model)
        if config is not None:
            from hybridize.models.configs import read_layout

            return read_layout(config.get("mixers"), self.num_layers, f"{self.run / model}/config.json: mixers")
        before = self.of(stage.models[0])  # those of a merge have one layout
        if not isinstance(stage, ConvertStage):
            return before
        types = self.manifests.get(model, {}).get("metrics", {}).get("layout")
        if not isinstance(types, list) or len(types) != self.num_layers:
            return None
        return LayoutSpec(layers=tuple(_mixers(stage, types, before)))

    def _config(self, model: str) -> dict[str, Any] | None:
        """A model's config.json, if it is there and says a shape."""
        try:
            config = json.loads((self.run / model / "config.json").read_text())
            return config if TeacherShape.of(config).num_layers == self.num_layers else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def teacher_config(self, teacher: str) -> dict[str, Any]:
        """The teacher's config: its own, or what a model of the run has kept of it.

        Raises:
            ValueError: neither is there.
        """
        if not Path(teacher).is_dir():
            models = [name for name, stage in self.stages.items() if stage.kind in MODEL_KINDS]
            config = next((config for config in map(self._config, models) if config is not None), None)
            if config is not None:
                return _without_mixers(config)
        try:
            return read_teacher_config(teacher)
        except ValueError as error:
            raise ValueError(
                f"{self.run}: no model in it has a config.json that would say the shape, and {error}; bring either here"
            ) from None


def _mixers(stage: ConvertStage, types: list[str], before: LayoutSpec | None) -> Iterator[MixerSpec]:
    """The mixers of a converted model, by their types and by what the stage and the model before it say of them."""
    whole = stage.whole_layout
    for layer, kind in enumerate(types):
        candidates = [
            *((before.layers[layer],) if before else ()),
            *((whole.layers[layer],) if whole else ()),
            stage.mixer,
        ]
        yield next((mixer for mixer in candidates if mixer.type == kind), None) or parse_mixer(kind)


def _without_mixers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the teacher that a hybrid, or a model like the teacher, was made from."""
    from hybridize.models import find_family

    family = find_family(config["model_type"])
    gone = ("mixers", "attention_types", "auto_map")
    if config["model_type"] == family.model_type:
        return {name: value for name, value in config.items() if name not in gone}
    fields = {name: value for name, value in config.items() if name not in (*gone, "layer_types")}
    if "attention_types" in config and "layer_types" in family.teacher_config().__dataclass_fields__:
        fields["layer_types"] = config["attention_types"]
    return fields | {"model_type": family.model_type, "architectures": [family.model_class]}


def measured_speeds(
    recipe: RecipeSpec, num_layers: int, run: Path, manifests: Mapping[str, Mapping[str, Any]]
) -> tuple[list[tuple[list[str], Speed]], tuple[str, ...]]:
    """What was measured in vLLM of the judged models' layouts.

    Args:
        recipe: expanded.
        num_layers: of the teacher.
        run: the folder, in which `serving.jsonl` may lie.
        manifests: of the stages that have finished, by name.

    Returns:
        Speeds in the records' order, each with the models that have the layout, and what was left out, in words.
    """
    file = run / SERVING_FILE
    if not file.is_file():
        return [], ()
    speeds, notes = read_speeds(file)
    try:
        judged = judged_layouts(recipe, num_layers, run, manifests)
    except ValueError as error:
        return [], (f"{file.name}: left out; {error}",)
    shapes: dict[tuple[str, str], ServedShape | None] = {}

    def is_of(speed: Speed, model: str, layout: LayoutSpec) -> bool:
        if str(layout) != speed.layout:
            return False
        key = (model, speed.state_dtype)
        if key not in shapes:
            try:
                shapes[key] = layout_shape(judged.config, layout, state_dtype=speed.state_dtype, place=model)
            except ValueError:  # a dtype of states, or a mixer, that this release does not serve
                shapes[key] = None
        shape = shapes[key]
        if shape is None:
            return False
        windows = shape.windows if any(shape.windows) else ()
        return (speed.weight_bytes, speed.state_bytes, speed.windows) == (
            shape.weight_bytes,
            sum(shape.states),
            windows,
        )

    found = []
    strangers: dict[str, int] = {}
    for speed in speeds:
        models = [model for model, layout in judged.layouts.items() if is_of(speed, model, layout)]
        if models:
            found.append((models, speed))
        else:
            strangers[speed.model] = strangers.get(speed.model, 0) + 1
    if strangers:
        names = ", ".join(strangers)
        count = sum(strangers.values())
        notes.append(
            f"{file.name}: {count} record{'s' if count > 1 else ''} of layouts or shapes that no judged model here has "
            f"({names}); left out"
        )
    return found, tuple(notes)

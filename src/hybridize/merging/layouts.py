"""Whether models can be merged: their layouts and configs, and the names and shapes of their tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from hybridize.models import find_family, hybrid_config_class, layout_of
from hybridize.models.checkpoint import read_model_type
from hybridize.models.families import HYBRID_PREFIX
from hybridize.models.stored import StoredTensors
from hybridize.spec import MixerSpec

# What may differ: it says nothing about what a weight means, or it is compared by other means.
_FREE = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attention_types",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "layer_types",
    "mixers",
    "model_type",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def check_same_configs(folders: Sequence[Path]) -> None:
    """Check that models have one layout and one architecture.

    Raises:
        ValueError: a folder holds no model; or one differs from the first. Names the first layer that differs and both
            mixers, or the field of the config and both values.
    """
    first, *others = [(folder, _read_config(folder)) for folder in folders]
    for other in others:
        _compare(first, other)


def check_same_tensors(models: Sequence[StoredTensors]) -> None:
    """Check that models have the same tensors, by name and shape.

    Raises:
        ValueError: names the tensor and both folders.
    """
    first = models[0]
    for other in models[1:]:
        for one, two in ((first, other), (other, first)):
            missing = [name for name in one.shapes if name not in two.shapes]
            if missing:
                more = f" and {len(missing) - 1} more" if missing[1:] else ""
                raise ValueError(
                    f"{two.folder}: it has no tensor {missing[0]}{more}, but {one.folder} has; merge models of one "
                    "architecture only"
                )
        for name, shape in first.shapes.items():
            if other.shapes[name] != shape:
                raise ValueError(
                    f"{other.folder}: tensor {name} has the shape {list(other.shapes[name])}, but {list(shape)} in "
                    f"{first.folder}; merge models of one architecture only"
                )


def _read_config(folder: Path) -> Any:
    model_type = read_model_type(folder)
    family = find_family(model_type, f"{folder}/config.json: model_type")
    is_hybrid = model_type.startswith(HYBRID_PREFIX)
    config_class = hybrid_config_class(family.model_type) if is_hybrid else family.teacher_config()
    try:
        return config_class.from_pretrained(folder)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{folder}/config.json: {error}; fetch or write the checkpoint again") from None


def _compare(first: tuple[Path, Any], other: tuple[Path, Any]) -> None:
    (folder, config), (other_folder, other_config) = first, other
    facts, others = _facts(config), _facts(other_config)
    # The layouts first: a layer says more than the tensors that follow from it. They need one number of layers.
    if config.num_hidden_layers == other_config.num_hidden_layers:
        layers = zip(layout_of(config).layers, layout_of(other_config).layers, strict=True)
        for layer, (mixer, other_mixer) in enumerate(layers):
            if mixer != other_mixer:
                raise ValueError(
                    f"{other_folder}: layer {layer} is {_describe(other_mixer, mixer)}, but "
                    f"{_describe(mixer, other_mixer)} in {folder}; merge models of one layout only"
                )
    for key in sorted(facts.keys() | others.keys()):
        if facts.get(key) != others.get(key):
            raise ValueError(
                f"{other_folder}/config.json: {key} is {others.get(key)!r}, but {facts.get(key)!r} in {folder}; "
                "merge models of one architecture only"
            )


def _facts(config: Any) -> dict[str, Any]:
    """What must be the same, as a teacher and a hybrid without mixers would both have it."""
    family = find_family(config.model_type)
    facts = {key: value for key, value in config.to_dict().items() if key not in _FREE}
    return facts | {"model_type": family.model_type, "attention_types": family.attention_types(config)}


def _describe(mixer: MixerSpec, other: MixerSpec) -> str:
    """A mixer's name, and what it has other than another of the same name."""
    if mixer.type != other.type:
        return mixer.type
    fields, others = mixer.model_dump(), other.model_dump()
    return f"{mixer.type} with " + ", ".join(f"{key}={fields[key]}" for key in fields if fields[key] != others[key])

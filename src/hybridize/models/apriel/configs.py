"""The config of an Apriel-H1 checkpoint and a hybrid's, either made from the other."""

import json
from collections.abc import Mapping
from typing import Any

from hybridize.models.configs import hybrid_config_class
from hybridize.models.families import find_family, geometry_of
from hybridize.spec import LayoutSpec, Mamba1Spec, MixerSpec, parse_mixer

MODEL_TYPE = "apriel_hybrid_ssm"
OLDER_MODEL_TYPES = ("apriel_ssm_thinker_hybrid",)
ARCHITECTURE = "AprielHybridSSMForCausalLM"

Shapes = Mapping[str, tuple[int, ...]]

# Kinds of layers in `hybrid_block_layout`, and the mixers that they are here.
BLOCKS = {"t": "attention", "m2": "mamba1", "i": "identity"}

# Keys of `ssm_cfg`. Sizes, with the spec's name for them:
_SIZES = {"d_state": "state_size", "d_inner": "d_inner", "d_xb": "d_xb", "dt_rank": "dt_rank", "d_conv": "conv_kernel"}
# what the initial step sizes are drawn from, called alike in the spec;
_STARTS = ("dt_min", "dt_max", "dt_init_floor")
# what has one value only in the mixer here;
_FIXED = {"bias": False, "conv_bias": True, "dt_proj_bias": True, "repeat_kv_before_conv": True}
# and what an m2 layer pays no heed to once it is made, with the values written when nothing else is known.
_INERT = {"expand": 1, "activation": "silu", "dt_init": "random", "dt_scale": 1.0, "chunk_size": 128}
_HEADS = ("n_v_heads", "n_qk_heads")  # inert too, but public code demands that d_inner is a multiple of them

# Keys beside Mistral's own, by older names or to say that a thing is not there.
_OLDER_NAMES = {"rope_theta", "rope_scaling", "torch_dtype"}
_ABSENT = {"attention_bias": False, "mlp_bias": False, "prediction_heads": 1}
# Fields that no tensor's shape could contradict.
_UNSEEN = ("hidden_act", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "sliding_window")


def hybrid_config(fields: Mapping[str, Any], shapes: Shapes, place: str) -> tuple[Any, dict[str, Any]]:
    """The config of the hybrid that an Apriel-H1 checkpoint becomes.

    Args:
        fields: of the checkpoint's config.json.
        shapes: of its tensors, by name; they give the sizes that the config leaves open.
        place: what to call the config in errors.

    Returns:
        A resolved `HybridMistralConfig`; and of the fields that no tensor could contradict, those that the checkpoint
        lacks, with Mistral's defaults, which hold for them.

    Raises:
        ValueError: a key is unknown, a kind of layer has no counterpart, or the sizes contradict the tensors. Names
            the key or the layer, and the remedy.
    """
    known = _mistral_fields() | _OLDER_NAMES | set(_ABSENT) | {"auto_map", "hybrid_block_layout", "ssm_cfg"}
    _check_keys(fields, known, place)
    for key, value in _ABSENT.items():
        if fields.get(key, value) != value:
            raise ValueError(
                f"{place}: {key} is {fields[key]!r}, but only {value!r} can be read; use another checkpoint"
            )
    blocks = _read_blocks(fields, place)
    ssm = fields.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise ValueError(f"{place}: ssm_cfg is {ssm!r}, but it maps names to values; fetch the checkpoint again")
    _check_keys(ssm, {*_SIZES, *_STARTS, *_FIXED, *_INERT, *_HEADS}, f"{place}: ssm_cfg")
    config = hybrid_config_class("mistral").from_dict(
        {key: value for key, value in fields.items() if key not in ("model_type", "auto_map", "hybrid_block_layout")}
    )
    config.architectures = [find_family("mistral").hybrid_model_class]
    layers = [
        _read_mamba(ssm, shapes, layer, place) if block == "m2" else parse_mixer(BLOCKS[block])
        for layer, block in enumerate(blocks)
    ]
    config.set_layout(LayoutSpec(layers=tuple(layers)).resolve(geometry_of(config)))
    # What the mixers do not hold is kept for the way back.
    config.ssm_cfg = {key: value for key, value in ssm.items() if key in {*_INERT, *_HEADS} or "m2" not in blocks}
    if not config.ssm_cfg:
        del config.ssm_cfg
    values = {**config.to_dict(), **config.rope_parameters}
    lacking = {key: values[key] for key in _UNSEEN if key not in {*fields, *(fields.get("rope_parameters") or {})}}
    return config, lacking


def apriel_fields(config: Any, place: str) -> dict[str, Any]:
    """The fields of the config.json that a hybrid gets as an Apriel-H1 checkpoint.

    `auto_map` is not among them, since the modelling code that it would point to is not written either.

    Args:
        config: a `HybridMistralConfig`.
        place: what to call the config in errors.

    Raises:
        ValueError: a layer or a field has no counterpart; names it, what prevents it, and the remedy.
    """
    fields = json.loads(config.to_json_string())
    layers = config.layout.layers
    letters = {mixer: block for block, mixer in BLOCKS.items()}
    for layer, spec in enumerate(layers):
        if spec.type not in letters:
            raise ValueError(
                f"{place}: mixers[{layer}]: the layer is a {spec.type}, but Apriel-H1 has only "
                f"{', '.join(letters)}; export a hybrid of these"
            )
    mambas = {layer: spec for layer, spec in enumerate(layers) if isinstance(spec, Mamba1Spec)}
    for layer, spec in mambas.items():
        _check_mamba(spec, next(iter(mambas.values())), f"{place}: mixers[{layer}]")
    if len(set(config.attention_types)) > 1:
        raise ValueError(
            f"{place}: attention_types differ between layers, but Mistral's do not; export a hybrid of a Mistral"
        )
    for key in ("mixers", "attention_types", "layer_types"):
        fields.pop(key, None)
    rope = fields.pop("rope_parameters")
    kind = rope.get("rope_type", "default")
    fields |= {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "hybrid_block_layout": [letters[spec.type] for spec in layers],
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if kind == "default" else rope,
        "torch_dtype": fields.pop("dtype", None),
    }
    kept = fields.pop("ssm_cfg", {})
    if mambas:
        kept = _ssm_cfg(next(iter(mambas.values())), kept)
    if kept:
        fields["ssm_cfg"] = kept
    _check_keys(fields, _mistral_fields() | _OLDER_NAMES | set(_ABSENT) | {"hybrid_block_layout", "ssm_cfg"}, place)
    return fields


def _mistral_fields() -> set[str]:
    return set(find_family("mistral").teacher_config()().to_dict())


def _check_keys(fields: Mapping[str, Any], known: set[str], place: str) -> None:
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"{place}: it has keys whose meaning is not known: {', '.join(unknown)}; "
            "remove them from the file if the model is the same without them"
        )


def _read_blocks(fields: Mapping[str, Any], place: str) -> list[str]:
    blocks, num_layers = fields.get("hybrid_block_layout"), fields.get("num_hidden_layers")
    if not isinstance(blocks, list) or len(blocks) != num_layers:
        given = f"{len(blocks)} entries" if isinstance(blocks, list) else f"no list ({blocks!r})"
        raise ValueError(
            f"{place}: hybrid_block_layout has {given} and num_hidden_layers is {num_layers}; "
            "write one entry for each layer"
        )
    for layer, block in enumerate(blocks):
        if not isinstance(block, str) or block not in BLOCKS:
            raise ValueError(
                f"{place}: hybrid_block_layout[{layer}] is {block!r}, which no mixer here stands for; "
                f"use a checkpoint whose layers are {', '.join(BLOCKS)}"
            )
    return blocks


def _read_mamba(ssm: Mapping[str, Any], shapes: Shapes, layer: int, place: str) -> MixerSpec:
    """The mixer of an m2 layer: sizes as its tensors have them, which the config may not contradict."""
    for key, value in _FIXED.items():
        if ssm.get(key, value) != value:
            raise ValueError(
                f"{place}: ssm_cfg.{key} is {ssm[key]!r}, but layer {layer} can only be read with {value!r}; "
                "use another checkpoint"
            )
    sizes = _sizes_of(shapes, layer, place)
    for key, name in _SIZES.items():
        if ssm.get(key) not in (None, "auto", sizes[name]):
            raise ValueError(
                f"{place}: ssm_cfg.{key} is {ssm[key]!r}, but by its tensors layer {layer} has {sizes[name]}; "
                "fetch the checkpoint again, or correct the config"
            )
    starts = {key: ssm[key] for key in _STARTS if ssm.get(key) is not None}
    return parse_mixer({"type": "mamba1", "dt_bias_mode": "double", **sizes, **starts}, f"{place}: layer {layer}")


def _sizes_of(shapes: Shapes, layer: int, place: str) -> dict[str, int]:
    prefix = f"model.layers.{layer}.mixer"
    found = {}
    for name, num_dims in (("A_log", 2), ("conv1d.weight", 3), ("dt_proj.weight", 2), ("in_proj.weight", 2)):
        shape = shapes.get(f"{prefix}.{name}")
        if shape is None or len(shape) != num_dims:
            what = "is missing" if shape is None else f"has shape {list(shape)}, which is not of {num_dims} dimensions"
            raise ValueError(f"{place}: layer {layer} is m2, but {prefix}.{name} {what}; fetch the checkpoint again")
        found[name] = shape
    d_inner, state_size = found["A_log"]
    dt_rank = found["dt_proj.weight"][1]
    # z | x | B | C, and in older checkpoints the step size's rows
    rows = found["in_proj.weight"][0] - 2 * d_inner - (dt_rank if is_fused(shapes, layer) else 0)
    if rows <= 0 or rows % 2:
        raise ValueError(
            f"{place}: layer {layer}: {found['in_proj.weight'][0]} rows of {prefix}.in_proj.weight do not go with "
            f"d_inner {d_inner} and dt_rank {dt_rank}; fetch the checkpoint again"
        )
    return {
        "state_size": state_size,
        "d_inner": d_inner,
        "d_xb": rows // 2,
        "dt_rank": dt_rank,
        "conv_kernel": found["conv1d.weight"][2],
    }


def is_fused(shapes: Shapes, layer: int) -> bool:
    """Whether an m2 layer has the step size's input projection as the last rows of `in_proj`."""
    return f"model.layers.{layer}.mixer.dt_in_proj.weight" not in shapes


def _check_mamba(spec: Mamba1Spec, first: Mamba1Spec, place: str) -> None:
    """Check that a layer has no more than the format can hold: one set of sizes for all, and no extras."""
    extras = {"gate_bias": False, "qkv_bias": False, "output_bias": False, "qk_norm": "none"}
    for name, value in extras.items():
        if getattr(spec, name) != value:
            raise ValueError(
                f"{place}.{name}: it is {getattr(spec, name)!r}, for which Apriel-H1 has no tensors; "
                f"export a hybrid that was made with {name}: {value}"
            )
    for key, name in _SIZES.items():
        if getattr(spec, name) != getattr(first, name):
            raise ValueError(
                f"{place}.{name}: it is {getattr(spec, name)}, but another layer has {getattr(first, name)} and "
                f"Apriel-H1 has one {key} for all; export a hybrid whose mamba1 layers are alike"
            )


def _ssm_cfg(spec: Mamba1Spec, kept: Mapping[str, Any]) -> dict[str, Any]:
    """`ssm_cfg` with every key: what a mixer says, and what else an import has kept."""
    inert = _INERT | dict.fromkeys(_HEADS, spec.num_heads)
    sizes = {key: getattr(spec, name) for key, name in _SIZES.items()}
    starts = {key: getattr(spec, key) for key in _STARTS}
    return {**inert, **kept, **_FIXED, **sizes, **starts}

"""Surgery: a teacher in memory becomes a hybrid in memory; what is not replaced keeps name and bits."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.models.adapter import MixerLayer
from hybridize.models.configs import check_resolved, hybrid_config_class
from hybridize.models.families import find_family, geometry_of
from hybridize.models.hybrid import (
    attention_module,
    hybrid_model_class,
    make_layer,
    set_attention_module,
    spec_of,
)
from hybridize.models.window import reset_sink
from hybridize.spec import AttentionSpec, LayoutSpec, MixerSpec, SlidingWindowSpec


def layout_of(config: Any) -> LayoutSpec:
    """The layout of a model: a hybrid's own, attention everywhere for a teacher."""
    layout = getattr(config, "layout", None)
    return layout if layout is not None else LayoutSpec(layers=(AttentionSpec(),) * config.num_hidden_layers)


def resolve_layout(config: Any, layout: LayoutSpec, place: str = "layout") -> LayoutSpec:
    """Fill in a layout's sizes for a model and check that the model can be given it.

    Args:
        config: the config of a teacher, or of a hybrid of which more layers are to be replaced.
        layout: one mixer per layer. A kind in its default stands for whatever mixer of that kind the layer has already.
        place: what to call the layout in errors.

    Raises:
        ValueError: the number of layers differs, or a layer that is a mixer already is to become something
            else.
    """
    current = layout_of(config).layers
    if len(layout.layers) != len(current):
        raise ValueError(
            f"{place}: it has {len(layout.layers)} layers, but the model has {len(current)}; give one mixer per layer"
        )
    there = [old if new == type(old)() else new for old, new in zip(current, layout.layers, strict=True)]
    resolved = LayoutSpec(layers=tuple(there)).resolve(geometry_of(config), place)
    for layer, (old, new) in enumerate(zip(current, resolved.layers, strict=True)):
        if not isinstance(old, AttentionSpec) and old != new:
            raise ValueError(
                f"{place}[{layer}]: the model's layer is a {old.type} already and its attention is gone or changed, "
                f"so it cannot become {new.type}{_difference(old, new)}; keep it as it is, or start from the "
                "original teacher"
            )
    return resolved


def _difference(old: MixerSpec, new: MixerSpec) -> str:
    """Where two specs of one kind differ, e.g. ` with state_size 8 in place of 16`."""
    if type(old) is not type(new):
        return ""
    before, after = old.model_dump(), new.model_dump()
    return " with " + ", ".join(
        f"{name} {after[name]!r} in place of {before[name]!r}" for name in before if before[name] != after[name]
    )


def convert_model(source: Any, layout: LayoutSpec, *, share: bool = False) -> Any:
    """Build the hybrid of a model: its tensors, with fresh mixers in the layers that the layout replaces.

    New mixers hold their constructor's initialisation, drawn from torch's global generator; carrying
    attention's weights over is the business of `hybridize.transfer`. A layer that becomes a sliding window keeps
    its attention's tensors, and a sink starts at 0.

    Args:
        source: a teacher of any family in the table, or a hybrid of which more layers are to be replaced.
        layout: one mixer per layer; open sizes are filled in from the model's attention.
        share: let the hybrid's parameters share their memory with the source's, which costs nothing but must
            not meet training: an update to one is an update to both.

    Returns:
        The hybrid, in the source's dtype, on its devices and in its training mode.

    Raises:
        ValueError: the family is not in the table, or the layout does not fit the model.
    """
    family = find_family(source.config.model_type)
    layout = resolve_layout(source.config, layout)
    config = hybrid_config_of(source.config, layout)
    with torch.device("meta"):
        hybrid = hybrid_model_class(family.model_type)(config)
    fresh = [
        layer
        for layer, (old, new) in enumerate(zip(layout_of(source.config).layers, layout.layers, strict=True))
        if old != new
    ]
    gone: tuple[str, ...] = ()
    for layer in fresh:
        parameter = next(attention_module(source, layer).parameters())
        module = attention_module(hybrid, layer)
        if isinstance(layout.layers[layer], SlidingWindowSpec):
            reset_sink(module, parameter.device)
            continue
        with torch.device(parameter.device):
            module = make_layer(config, layer, module)
        set_attention_module(hybrid, layer, module.cast(parameter.dtype))
        gone += (f"{family.attention_path(layer)}.",)
    kept = {
        name: tensor if share else tensor.clone()
        for name, tensor in source.state_dict().items()
        if not name.startswith(gone)
    }
    hybrid.load_state_dict(kept, strict=False, assign=True)
    _copy_buffers(source, hybrid)
    hybrid.tie_weights()
    hollow = [name for name, tensor in _all_tensors(hybrid).items() if tensor.is_meta]
    if hollow:
        raise ValueError(f"the source lacks tensors that the hybrid needs: {', '.join(hollow)}")
    if getattr(source, "generation_config", None) is not None:
        hybrid.generation_config = copy.deepcopy(source.generation_config)
    return hybrid.train(source.training)


def hybrid_config_of(config: Any, layout: LayoutSpec) -> Any:
    """A hybrid's config: the source's fields, with the layout as mixers.

    Args:
        config: the config of a teacher or a hybrid.
        layout: resolved, one mixer per layer.
    """
    family = find_family(config.model_type)
    fields = config.to_dict()
    for name in ("model_type", "architectures", "mixers", "layer_types", "auto_map"):
        fields.pop(name, None)
    fields["attention_types"] = family.attention_types(config)
    hybrid = hybrid_config_class(family.model_type).from_dict(fields)
    hybrid.architectures = [family.hybrid_model_class]
    hybrid.set_layout(layout)
    hybrid._attn_implementation = config._attn_implementation
    return hybrid


def swap_layer(hybrid: Any, layer: int, new: MixerSpec | nn.Module) -> nn.Module:
    """Put another mixer into one layer of a hybrid, in place, and return the module that was there.

    To undo it, swap the returned module back in. A hybrid without replaced layers is
    `convert_model(teacher, all_attention, share=True)`.

    Args:
        hybrid: a hybrid of any layout.
        layer: 0-based.
        new: a mixer spec, for a fresh mixer in its constructor's initialisation; or a module that was in this
            place. A fresh sliding window shares its parameters with the attention that was there.

    Raises:
        ValueError: the model is not a hybrid, has no such layer, or attention is asked for without its
            module, or a window over what is not attention.
    """
    layout = getattr(hybrid.config, "layout", None)
    if layout is None:
        raise ValueError(
            f"swap_layer: {type(hybrid).__name__} is not a hybrid; make one with convert_model(model, layout)"
        )
    if not 0 <= layer < len(layout.layers):
        raise ValueError(
            f"layer: the model has no layer {layer}; it has {len(layout.layers)}, use 0..{len(layout.layers) - 1}"
        )
    old = attention_module(hybrid, layer)
    if isinstance(new, nn.Module):
        _set_spec(hybrid.config, layer, spec_of(new))
        set_attention_module(hybrid, layer, new)
        return old
    if isinstance(new, AttentionSpec):
        raise ValueError(f"layer {layer}: to go back to attention, hand over the module that was swapped out")
    if isinstance(new, SlidingWindowSpec) and not isinstance(spec_of(old), AttentionSpec):
        raise ValueError(
            f"layer {layer}: a sliding window goes over attention, but the layer is a {spec_of(old).type}; swap its "
            "attention module in first"
        )
    _set_spec(hybrid.config, layer, new.resolve(geometry_of(hybrid.config)))
    parameter = _parameter_beside(hybrid, layer)
    with torch.device(parameter.device):
        module = make_layer(hybrid.config, layer, old)
    if isinstance(module, MixerLayer):
        module.cast(parameter.dtype)
    module.train(old.training)
    set_attention_module(hybrid, layer, module)
    return old


def _parameter_beside(hybrid: Any, layer: int) -> nn.Parameter:
    """A parameter of a layer's norms or MLP: it tells device and dtype, which a mixer may not."""
    family = find_family(hybrid.config.model_type)
    parameters = hybrid.get_submodule(f"{family.layers}.{layer}").named_parameters()
    return next(parameter for name, parameter in parameters if not name.startswith(f"{family.attention}."))


def _set_spec(config: Any, layer: int, spec: MixerSpec) -> None:
    check_resolved(spec, f"config.mixers[{layer}]")
    layers = list(config.layout.layers)
    layers[layer] = spec
    config.set_layout(LayoutSpec(layers=tuple(layers)))


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy buffers, such as RoPE's frequencies, that no state dict holds."""
    for name, module in target.named_modules():
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                value = source.get_submodule(name)._buffers[key]
                module._buffers[key] = None if value is None else value.clone()


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())

"""The hybrids' model classes: the teacher's own class with some attention modules swapped for mixers.

`HybridLlamaForCausalLM(LlamaForCausalLM)` and its like are built by one factory from the table of families.
Nothing of the teacher's modelling code is copied: `__init__` builds the teacher's modules and then replaces
the attention modules of the layers whose entry in `config.mixers` is not attention, or gives them a window
(see `hybridize.models.window`). The body, that is the base
model and all in it, sees the config with the teacher's own kinds of layers (see `BodyConfigMixin`).

What a mixer must know beyond its input, padding and the starts of packed documents, is derived once per
forward by a hook on the base model and travels to the layers as keyword arguments, which decoder layers pass
on to attention. It sits on the base model so that calls to `model.model` (losses that never hold all logits
make them) are covered too.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import find_packed_sequence_indices

from hybridize.models.adapter import FP32_PATTERNS, MixerLayer
from hybridize.models.configs import body_config, hybrid_config_class
from hybridize.models.families import FAMILIES, ModelFamily, find_family
from hybridize.models.window import fill_missing_sink, windowed
from hybridize.spec import AttentionSpec, MixerSpec, SlidingWindowSpec


class HybridMixin:
    """What makes a family's causal language model a hybrid."""

    _is_stateful = True  # a recurrent state cannot be rolled back: no assisted decoding
    _can_compile_fullgraph = False
    _keep_in_fp32_modules_strict = FP32_PATTERNS

    config: Any
    base_model: Any
    modules: Any
    post_init: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(body_config(config), *args, **kwargs)  # type: ignore[call-arg]
        self.config = config
        for layer in config.layout.replaced:
            set_attention_module(self, layer, make_layer(config, layer, attention_module(self, layer)))
        self.base_model.register_forward_pre_hook(_hand_to_mixers, with_kwargs=True)
        self.post_init()

    def initialize_weights(self) -> None:
        """Initialise what no checkpoint has filled: mixers by their own rule, the rest by the teacher's."""
        for module in self.modules():
            if isinstance(module, MixerLayer):
                module.initialize_missing()
            elif isinstance(getattr(module, "spec", None), SlidingWindowSpec):
                fill_missing_sink(module)
        super().initialize_weights()  # type: ignore[misc]

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Leave the 2-D mask as it is for static caches as well: the mixers need to see the padding."""
        return attention_mask


def make_layer(config: Any, layer: int, attention: nn.Module) -> nn.Module:
    """Build what stands in the place of one layer's attention, as the config describes it.

    Args:
        config: a hybrid's, whose layout says something else than attention for the layer.
        layer: 0-based.
        attention: the module that is there; only a sliding window takes over its parameters, and shares them.

    Returns:
        A `MixerLayer`; or for a sliding window a module of attention's class. What is new in it is initialised.
    """
    spec = config.layout.layers[layer]
    if isinstance(spec, SlidingWindowSpec):
        return windowed(attention, config, layer)
    return MixerLayer(
        spec,
        config.hidden_size,
        layer,
        initializer_range=getattr(config, "initializer_range", None) or 0.02,
        cache_argument=find_family(config.model_type).cache,
    )


def spec_of(module: nn.Module) -> MixerSpec:
    """The spec of what stands in the place of a layer's attention: of a mixer, a window, or attention itself."""
    spec = getattr(module, "spec", None)
    return AttentionSpec() if spec is None else spec


def attention_module(model: nn.Module, layer: int) -> nn.Module:
    """What mixes along the sequence in one layer: attention, the teacher's or windowed, or a `MixerLayer`."""
    family = find_family(model.config.model_type)
    return model.get_submodule(family.attention_path(layer))


def set_attention_module(model: nn.Module, layer: int, module: nn.Module) -> None:
    """Put `module` where the layer has its attention. The config is the caller's business."""
    path = find_family(model.config.model_type).attention_path(layer)
    model.set_submodule(path, module, strict=True)


def _hand_to_mixers(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Derive padding and document starts from a base model's inputs, as further keyword arguments."""
    if not module.config.has_mixers:
        return None
    inputs = kwargs
    if args:  # their order differs between families
        inputs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    if tokens is None:
        return None
    batch, length = tokens.shape[:2]
    handed: dict[str, Any] = {}
    if mask is not None:
        valid_BL = _valid_tokens(mask, length, inputs.get("past_key_values") is not None)
        if valid_BL is not None:
            handed |= {"mixer_valid": valid_BL} | _cache_with_padding(inputs, valid_BL)
        if module.config.has_windows:
            handed |= _valid_keys(mask, length)
    elif positions is not None and inputs.get("past_key_values") is None:
        starts_BL = document_starts(positions, batch)
        if starts_BL is not None:
            # With a cache, transformers' attention masks would let packed documents leak into one another.
            handed |= {"mixer_starts": starts_BL} | _without_cache(inputs, "packed documents")
    return ((), inputs | handed) if handed else None


def _valid_tokens(mask: Any, length: int, has_cache: bool) -> Tensor | None:
    """The last `length` columns of a 2-D padding mask as [batch, length] bool; None if nothing is padding."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = f"of {mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: a hybrid needs the 2-D padding mask [batch, length], got {shape}; a mixer "
            "cannot follow any other. For packed documents pass position_ids that restart at 0, and no mask"
        )
    if length == 1 and has_cache:
        return None  # a token being generated is never padding
    valid_BL = mask[:, -length:].to(torch.bool)
    if not torch.compiler.is_compiling() and bool(valid_BL.all()):
        return None
    return valid_BL


def _valid_keys(mask: Tensor, length: int) -> dict[str, Tensor]:
    """The whole padding mask as [batch, tokens seen] bool, for attention that reads a cache; {} if all are tokens."""
    valid_BS = mask.to(torch.bool)
    if length > 1 and not torch.compiler.is_compiling() and bool(valid_BS.all()):
        return {}
    return {"mixer_valid_keys": valid_BS}


def _cache_with_padding(inputs: dict[str, Any], valid_BL: Tensor) -> dict[str, Any]:
    """Keep padding that follows a token out of a cache: a mixer's state must end with a row's last token."""
    cache = inputs.get("past_key_values")
    if torch.compiler.is_compiling():
        return {}
    if cache is not None and int(cache.get_seq_length()) > 0:
        return _without_cache(inputs, "sequences with padding after their first token")
    if bool((valid_BL[:, :-1] & ~valid_BL[:, 1:]).any()):
        return _without_cache(inputs, "sequences that are not padded on the left")
    return {}


def _without_cache(inputs: dict[str, Any], what: str) -> dict[str, Any]:
    """Turn the cache off where the caller leaves it open; raise a `ValueError` where one is asked for."""
    if inputs.get("use_cache") or inputs.get("past_key_values") is not None:
        raise ValueError(
            f"use_cache: a hybrid cannot cache {what}; pass use_cache=False, or one document per row, "
            "padded on the left"
        )
    return {"use_cache": False}


def document_starts(position_ids: Tensor, batch: int) -> Tensor | None:
    """Find where packed documents start, by the very rule that transformers' attention masks use.

    Args:
        position_ids: [batch or 1, length]; a new document starts wherever they do not rise by 1.
        batch: B.

    Returns:
        [batch, length] bool, True at the first token of each document; None if every row is one document.
    """
    document_BL = find_packed_sequence_indices(position_ids)
    if document_BL is None:
        return None
    before_first = document_BL[:, :1] - 1
    return torch.diff(document_BL, prepend=before_first, dim=-1).ne(0).expand(batch, -1)


@functools.cache
def hybrid_model_class(model_type: str) -> Any:
    """The hybrid's model class of one family, by the teacher's model type, e.g. `HybridLlamaForCausalLM`."""
    return _build(find_family(model_type))


def _build(family: ModelFamily) -> Any:
    _read_checkpoints_alike(family)
    body = {
        "__module__": __name__,
        "__doc__": f"{family.model_class} with the attention of some layers replaced by mixers (`config.mixers`).",
        "config_class": hybrid_config_class(family.model_type),
    }
    return type(family.hybrid_model_class, (HybridMixin, family.teacher_model()), body)


def _read_checkpoints_alike(family: ModelFamily) -> None:
    """Let a hybrid's checkpoint name and split its tensors as the teacher's does.

    Some tensors lie otherwise on disk than in memory: a mixture's experts one by one, GPT-NeoX's head by another
    name. transformers knows the rules by the model's class or type, so it must be told them for the hybrid's.
    """
    for own, hybrid in ((family.model_class, family.hybrid_model_class), (family.model_type, family.hybrid_type)):
        rules = get_checkpoint_conversion_mapping(own)
        if rules is not None:
            register_checkpoint_conversion_mapping(hybrid, rules, overwrite=True)


def __getattr__(name: str) -> Any:
    """Make `HybridLlamaForCausalLM` and its like importable (and picklable) by name; built at first use."""
    for family in FAMILIES.values():
        if name == family.hybrid_model_class:
            return hybrid_model_class(family.model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

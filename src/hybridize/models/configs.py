"""The hybrids' config classes, one per family: the teacher's config plus every layer's resolved mixer."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from hybridize import _register
from hybridize.models.families import FAMILIES, ModelFamily, find_family
from hybridize.spec import AttentionSpec, LayoutSpec, parse_mixer
from hybridize.spec.base import Spec

LINEAR = "linear_attention"
CLOCK = "hybrid"


class HybridConfigMixin:
    """What makes a family's config a hybrid's: the field `mixers`, one resolved mixer spec per layer.

    `mixers` is a list of plain dicts, e.g. `{"type": "attention"}` or `{"type": "mamba1", "d_inner": 4096,
    ...}`; `None` means attention everywhere. `layer_types` follows from it and from the teacher's own
    attention: it is what transformers' `DynamicCache` reads to give every layer the cache it needs.
    """

    model_type: ClassVar[str]
    mixers: list[dict[str, Any]] | None
    layer_types: list[str]
    num_hidden_layers: int

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("layer_types", None)  # derived below; Mistral's config warns when it is handed one
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.set_layout(read_layout(self.mixers, self.num_hidden_layers))
        _register.register_model(find_family(self.model_type).model_type)

    @property
    def layout(self) -> LayoutSpec:
        """The mixers as a layout."""
        return read_layout(self.mixers, self.num_hidden_layers)

    @property
    def has_mixers(self) -> bool:
        """Whether any layer is not attention."""
        return LINEAR in self.layer_types or CLOCK in self.layer_types

    def set_layout(self, layout: LayoutSpec) -> None:
        """Replace the mixers; `layout` must be resolved and as long as the model."""
        self.mixers = [mixer.model_dump() for mixer in layout.layers]
        types = find_family(self.model_type).attention_types(self)
        replaced = layout.replaced
        self.layer_types = [LINEAR if layer in replaced else kind for layer, kind in enumerate(types)]
        if len(replaced) == len(types):
            # transformers asks an attention layer's cache for the number of tokens seen. Where none is left,
            # layer 0 gets a cache that can also count (see MixerLayer).
            self.layer_types[0] = CLOCK


def read_layout(mixers: Sequence[Any] | None, num_layers: int, place: str = "config.mixers") -> LayoutSpec:
    """Read a config's mixers as a layout.

    Raises:
        ValueError: names the place, e.g. `config.mixers[7].d_inner`, the value and the remedy.
    """
    if mixers is None:
        return LayoutSpec(layers=(AttentionSpec(),) * num_layers)
    if len(mixers) != num_layers:
        raise ValueError(
            f"{place}: it has {len(mixers)} entries, but the model has {num_layers} layers; give one entry per layer"
        )
    layers = [parse_mixer(mixer, f"{place}[{layer}]") for layer, mixer in enumerate(mixers)]
    for layer, spec in enumerate(layers):
        check_resolved(spec, f"{place}[{layer}]")
    return LayoutSpec(layers=tuple(layers))


def check_resolved(spec: Spec, place: str) -> None:
    """Raise a `ValueError` if the spec leaves a size open."""
    open_fields = [name for name in type(spec).model_fields if getattr(spec, name) is None]
    if open_fields:
        raise ValueError(f"{place}.{open_fields[0]}: it is left open (None); resolve the layout before storing it")


@functools.cache
def hybrid_config_class(model_type: str) -> Any:
    """The hybrid's config class of one family, by the teacher's model type, e.g. `HybridLlamaConfig`."""
    family = find_family(model_type)
    return _build(family)


def _build(family: ModelFamily) -> Any:
    from huggingface_hub.dataclasses import strict

    body = {
        "__module__": __name__,
        "__doc__": f"{family.config_class} plus `mixers`: the resolved mixer spec of every layer.",
        "__annotations__": {"mixers": list[dict[str, Any]] | None},
        "mixers": None,
        "model_type": family.hybrid_type,
    }
    return strict(type(family.hybrid_config_class, (HybridConfigMixin, family.teacher_config()), body))


def __getattr__(name: str) -> Any:
    """Make `HybridLlamaConfig` and its like importable (and picklable) by name; built at first use."""
    for family in FAMILIES.values():
        if name == family.hybrid_config_class:
            return hybrid_config_class(family.model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

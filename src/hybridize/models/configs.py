"""The hybrids' config classes, one per family: the teacher's config plus every layer's resolved mixer."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hybridize import _register
from hybridize.models.families import FAMILIES, ModelFamily, find_family
from hybridize.spec import AttentionSpec, LayoutSpec, SlidingWindowSpec, parse_mixer
from hybridize.spec.base import Spec

LINEAR = "linear_attention"
CLOCK = "hybrid"
SLIDING = "sliding_attention"
FULL = "full_attention"

# By this name transformers' attention modules find the function of sliding-window layers (see `models.window`).
WINDOW_ATTENTION = "hybridize_window"


class HybridConfigMixin:
    """What makes a family's config a hybrid's: the field `mixers`, one resolved mixer spec per layer.

    `mixers` is a list of plain dicts, e.g. `{"type": "attention"}`, `{"type": "mamba1", "d_inner": 4096, ...}` or
    `{"type": "sliding_window", "window": 512, "sink": true}`; `None` means attention everywhere.
    `attention_types` is the kind of every layer's attention in the teacher, such as Gemma's sliding and full
    attention in turns, replaced layers included. `layer_types` follows from both: it is what transformers'
    `DynamicCache` reads to give every layer the cache it needs. A sliding window is attention still, and keeps the
    teacher's kind there; it makes its cache as small as its window when it first meets it.
    """

    model_type: ClassVar[str]
    mixers: list[dict[str, Any]] | None
    attention_types: list[str] | None
    layer_types: list[str] | None
    num_hidden_layers: int

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("layer_types", None)  # derived below; Mistral's config warns when it is handed one
        if "layer_types" in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            self.layer_types = self.attention_types  # the teacher's config fills in its own where there are none
        super().__post_init__(**kwargs)  # type: ignore[misc]
        family = find_family(self.model_type)
        self.attention_types = family.attention_types(self)
        if len(self.attention_types) != self.num_hidden_layers:
            raise ValueError(
                f"config.attention_types: it has {len(self.attention_types)} entries, but the model has "
                f"{self.num_hidden_layers} layers; give one entry per layer, or leave it out"
            )
        self.set_layout(read_layout(self.mixers, self.num_hidden_layers))
        _register.register_model(family.model_type)

    @property
    def layout(self) -> LayoutSpec:
        """The mixers as a layout."""
        return read_layout(self.mixers, self.num_hidden_layers)

    @property
    def has_mixers(self) -> bool:
        """Whether any layer is not the teacher's attention as it was."""
        return any(mixer["type"] != "attention" for mixer in self.mixers or ())

    @property
    def has_windows(self) -> bool:
        """Whether any layer is sliding-window attention."""
        return any(mixer["type"] == "sliding_window" for mixer in self.mixers or ())

    @property
    def _rope_type_labels(self) -> list[str] | None:
        """The kinds of attention that may have a rotary embedding of their own; read by transformers."""
        return self.attention_types or getattr(self, "layer_types", None)

    def set_layout(self, layout: LayoutSpec) -> None:
        """Replace the mixers; `layout` must be resolved and as long as the model."""
        self.mixers = [mixer.model_dump() for mixer in layout.layers]
        types = self.attention_types or []
        # A sliding window is still attention, of the teacher's kind: it asks for that kind's masks and cache.
        kept = (AttentionSpec, SlidingWindowSpec)
        replaced = [layer for layer, mixer in enumerate(layout.layers) if not isinstance(mixer, kept)]
        self.layer_types = [LINEAR if layer in replaced else kind for layer, kind in enumerate(types)]
        # transformers asks the cache for the number of tokens seen: of an attention layer, or where some of them
        # slide, of the first layer that does not (up to 5.22 even if it is a mixer). If the layer asked has become
        # a mixer, it gets a cache that can also count (see MixerLayer).
        mixed = {SLIDING, FULL} <= set(types)
        asked = next(i for i, kind in enumerate(self.layer_types) if kind != SLIDING) if mixed else 0
        if asked in replaced and (mixed or len(replaced) == len(types)):
            self.layer_types[asked] = CLOCK


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
    layers = [parse_mixer(_complete(mixer), f"{place}[{layer}]") for layer, mixer in enumerate(mixers)]
    for layer, spec in enumerate(layers):
        check_resolved(spec, f"{place}[{layer}]")
    return LayoutSpec(layers=tuple(layers))


def _complete(mixer: Any) -> Any:
    """A stored mixer with what it says of biases and norms, which the first checkpoints had none of and leave out."""
    if isinstance(mixer, Mapping) and mixer.get("type") == "mamba1":
        return {"qkv_bias": False, "output_bias": False, "qk_norm": "none", "norm_eps": 1e-6} | dict(mixer)
    return mixer


def check_resolved(spec: Spec, place: str) -> None:
    """Raise a `ValueError` if the spec leaves a size open."""
    open_fields = [name for name in type(spec).model_fields if getattr(spec, name) is None]
    if open_fields:
        raise ValueError(f"{place}.{open_fields[0]}: it is left open (None); resolve the layout before storing it")


class BodyConfigMixin:
    """A hybrid's config as its body sees it, the teacher's own modelling code.

    The body asks `layer_types` which mask and which rotary embedding each layer's attention needs, and knows
    no linear attention; so here they are the teacher's. Whoever asks for the config of the whole text model,
    as the caches do, gets the hybrid's. All fields are shared with it, so that neither can fall behind.
    """

    __slots__ = ("whole",)
    whole: Any
    _mixin: ClassVar[type["BodyConfigMixin"]]

    @property
    def layer_types(self) -> list[str] | None:
        """The kind of every layer's attention in the teacher."""
        return self.whole.attention_types

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The hybrid's config."""
        return self.whole

    def to_diff_dict(self) -> dict[str, Any]:
        """The hybrid's fields that are not at their default, as they are written to config.json."""
        return self.whole.to_diff_dict()

    def __reduce__(self) -> Any:
        return _view, (self._mixin, self.whole)

    def __copy__(self) -> Any:
        return _view(self._mixin, copy.copy(self.whole))


class WindowConfigMixin(BodyConfigMixin):
    """A hybrid's config as its sliding-window layers see it: as the body does, but for the attention function.

    Whatever the other layers' attention is called, theirs is `WINDOW_ATTENTION`.
    """

    __slots__ = ()

    @property
    def _attn_implementation(self) -> str:
        return WINDOW_ATTENTION


def body_config(config: Any) -> Any:
    """A hybrid's config as its body is to see it (see `BodyConfigMixin`)."""
    return _view(BodyConfigMixin, config)


def window_config(config: Any) -> Any:
    """A hybrid's config as its sliding-window layers are to see it (see `WindowConfigMixin`)."""
    return _view(WindowConfigMixin, config)


def _view(mixin: Any, config: Any) -> Any:
    view = object.__new__(_view_class(mixin, find_family(config.model_type).model_type))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "whole", config)
    return view


@functools.cache
def _view_class(mixin: Any, model_type: str) -> Any:
    config_class = hybrid_config_class(model_type)
    name = config_class.__name__ + ("OfWindow" if mixin is WindowConfigMixin else "OfBody")
    return type(name, (mixin, config_class), {"__slots__": (), "_mixin": mixin})


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
        "__annotations__": {"mixers": list[dict[str, Any]] | None, "attention_types": list[str] | None},
        "mixers": None,
        "attention_types": None,
        "model_type": family.hybrid_type,
    }
    return strict(type(family.hybrid_config_class, (HybridConfigMixin, family.teacher_config()), body))


def __getattr__(name: str) -> Any:
    """Make `HybridLlamaConfig` and its like importable (and picklable) by name; built at first use."""
    for family in FAMILIES.values():
        if name == family.hybrid_config_class:
            return hybrid_config_class(family.model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What an architecture is to an export, and what may prevent a hybrid from being one."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hybridize.models.configs import FULL
from hybridize.models.exports.pieces import Pieces
from hybridize.models.families import find_family
from hybridize.spec import AttentionSpec

# Rotary embeddings that transformers' classes and vLLM take by the same parameters as the teacher's class does.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Fields that the teacher's config and the exported one have alike.
_ALIKE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "dtype",
)


class Obstacles:
    """What prevents an export, gathered: one line for each reason, with all layers that it holds for."""

    def __init__(self) -> None:
        self._layers: dict[tuple[str, str], list[int]] = {}

    def add(self, field: str, reason: str, layer: int | None = None) -> None:
        """Add one.

        Args:
            field: of the config, or of a layer's mixer; empty for a layer as such.
            reason: the value, why it does not fit and the remedy.
            layer: the layer, if it is one.
        """
        layers = self._layers.setdefault((field, reason), [])
        if layer is not None:
            layers.append(layer)

    def lines(self) -> list[str]:
        """Each as `mixers[1, 3].qk_norm: reason`."""
        return [
            (f"mixers[{', '.join(map(str, layers))}]{'.' if field else ''}{field}" if layers else field) + f": {reason}"
            for (field, reason), layers in self._layers.items()
        ]


@dataclass(frozen=True)
class Format:
    """An architecture of vLLM's that a hybrid may be written as.

    Attributes:
        name: for users.
        config_class: name of its config class in transformers.
        architecture: name of its model class, in transformers and in vLLM.
        mixer: type of the mixers that it has beside attention.
        obstacles: from a hybrid's config, what prevents it, a line each; none where it fits.
        fields: from a hybrid's config and its planned tensors, the fields of the exported config.
        plan: plans all tensors; returns what a user should know of them, a line each.
    """

    name: str
    config_class: str
    architecture: str
    mixer: str
    obstacles: Callable[[Any], list[str]]
    fields: Callable[[Any, Pieces], dict[str, Any]]
    plan: Callable[[Any, Pieces], list[str]]


def check_body(found: Obstacles, config: Any, families: Collection[str], why: str) -> bool:
    """Add what is in the way outside the mixers.

    Args:
        found: to add to.
        config: the hybrid's.
        families: model types of teachers that the architecture's attention and MLP can be.
        why: what the others have or lack.

    Returns:
        Whether the family is one of these. If it is not, no other reason matters.
    """
    family = find_family(config.model_type).model_type
    if family not in families:
        found.add("model_type", f"a {family} {why}; only {', '.join(families)} can be written")
        return False
    if config.hidden_act not in ("silu", "swish"):
        found.add("hidden_act", f"it is {config.hidden_act!r}, but MLP and mixers share one activation, SiLU")
    if getattr(config, "mlp_bias", False):
        found.add("mlp_bias", "the MLPs have biases, for which it has no tensors")
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        found.add("rope_parameters.rope_type", f"it is {kind!r}, but only {', '.join(_ROPE_TYPES)} are known to agree")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.add("rope_parameters.partial_rotary_factor", "only heads that are rotated whole can be written")
    return True


def check_layers(
    found: Obstacles, config: Any, mixer: str, fixed: Mapping[str, tuple[Any, str]], alike: Collection[str]
) -> None:
    """Add which layers are in the way.

    Args:
        found: to add to.
        config: the hybrid's.
        mixer: type of the mixers that the architecture has beside attention.
        fixed: fields of such a mixer that have one value only, with that value and why.
        alike: fields that must be the same in all of them.
    """
    layers = config.layout.layers
    mixers = [spec for spec in layers if spec.type == mixer]
    for layer, spec in enumerate(layers):
        if isinstance(spec, AttentionSpec):
            if (kind := config.attention_types[layer]) != FULL:
                found.add("", f"its attention is {kind}, but it can only be {FULL}", layer)
        elif spec.type != mixer:
            found.add("", f"the layer is a {spec.type}, but it can only be attention or {mixer}", layer)
        else:
            for name, (value, why) in fixed.items():
                if (own := getattr(spec, name)) != value:
                    found.add(name, f"it is {own!r}, but {why}; only {value!r} can be written", layer)
            for name in alike:
                if (own := getattr(spec, name)) != (first := getattr(mixers[0], name)):
                    found.add(name, f"it is {own!r}, but {first!r} elsewhere, and all must be alike", layer)
    if not found.lines() and len(mixers) in (0, len(layers)):
        found.add("mixers", f"it needs at least one layer of attention and one {mixer}")


def resolved(size: int | None) -> int:
    """A size of a mixer in a hybrid's config, where none is open."""
    assert size is not None, "a hybrid's specs are resolved"
    return size


def shared_fields(config: Any, mixer: str) -> dict[str, Any]:
    """The fields of an exported config that are the hybrid's own, and the kinds of its layers."""
    kinds = ["linear_attention" if spec.type == mixer else FULL for spec in config.layout.layers]
    return {name: getattr(config, name) for name in _ALIKE} | {"hidden_act": "silu", "layer_types": kinds}

"""The one table of model families: where a decoder keeps its layers and its attention's tensors.

A family is a row. To support the next one, add a row to `FAMILIES` below: the surgery, the hybrid's config
and model classes, their registration with the Auto classes, and the transfer all read this table and nothing
else. Imports no torch and no transformers, so that it answers at once.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybridize.spec import AttentionGeometry

HYBRID_PREFIX = "hybrid_"


def _geometry(config: Any) -> AttentionGeometry:
    """Read the sizes of attention from a config that uses transformers' usual names."""
    num_heads = config.num_attention_heads
    return AttentionGeometry(
        hidden_size=config.hidden_size,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    )


def _all_full(config: Any) -> list[str]:
    """Every layer attends to everything before it."""
    return ["full_attention"] * config.num_hidden_layers


def _all_sliding_if_windowed(config: Any) -> list[str]:
    """Every layer has the same window if the config sets one, as in Mistral (arXiv 2310.06825)."""
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


@dataclass(frozen=True)
class ModelFamily:
    """One row: everything that differs between decoders, as far as surgery and transfer care.

    Attributes:
        model_type: the `model_type` in the teacher's config.json.
        config_class: name of its config class in transformers.
        model_class: name of its causal language model in transformers.
        layers: path of the list of decoder layers from the causal language model.
        attention: name of the attention submodule within a decoder layer.
        q: name of the query projection within the attention submodule; likewise `k`, `v`, `o`.
        k: name of the key projection.
        v: name of the value projection.
        o: name of the output projection.
        geometry: reads the sizes of attention from the config.
        attention_types: reads transformers' cache layer type of every layer's attention from the config.
    """

    model_type: str
    config_class: str
    model_class: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    geometry: Callable[[Any], AttentionGeometry] = _geometry
    attention_types: Callable[[Any], list[str]] = _all_full

    @property
    def hybrid_type(self) -> str:
        """The `model_type` of this family's hybrids, e.g. `hybrid_llama`."""
        return HYBRID_PREFIX + self.model_type

    @property
    def hybrid_config_class(self) -> str:
        """Name of the hybrid's config class, e.g. `HybridLlamaConfig`."""
        return "Hybrid" + self.config_class

    @property
    def hybrid_model_class(self) -> str:
        """Name of the hybrid's model class, e.g. `HybridLlamaForCausalLM`."""
        return "Hybrid" + self.model_class

    def attention_path(self, layer: int) -> str:
        """Dotted path of one layer's attention submodule, e.g. `model.layers.3.self_attn`."""
        return f"{self.layers}.{layer}.{self.attention}"

    def teacher_config(self) -> Any:
        """The family's config class in transformers."""
        return getattr(self._module("configuration"), self.config_class)

    def teacher_model(self) -> Any:
        """The family's causal language model class in transformers."""
        return getattr(self._module("modeling"), self.model_class)

    def _module(self, kind: str) -> Any:
        return importlib.import_module(f"transformers.models.{self.model_type}.{kind}_{self.model_type}")


FAMILIES: dict[str, ModelFamily] = {
    row.model_type: row
    for row in (
        ModelFamily("llama", "LlamaConfig", "LlamaForCausalLM"),
        ModelFamily("mistral", "MistralConfig", "MistralForCausalLM", attention_types=_all_sliding_if_windowed),
    )
}


def find_family(model_type: str | None, place: str = "config.model_type") -> ModelFamily:
    """Find the row of a teacher's or a hybrid's model type.

    Args:
        model_type: e.g. `llama` or `hybrid_llama`.
        place: where the value stands, for the error.

    Raises:
        ValueError: the table has no such row; names the value, the rows there are, and where to add one.
    """
    family = FAMILIES.get((model_type or "").removeprefix(HYBRID_PREFIX))
    if family is None:
        raise ValueError(
            f"{place}: the model family {model_type!r} is not in the table; use a model of one of "
            f"{', '.join(FAMILIES)}, or add a row to FAMILIES in hybridize/models/families.py"
        )
    return family


def geometry_of(config: Any) -> AttentionGeometry:
    """Read the sizes of attention from a teacher's or a hybrid's config."""
    return find_family(config.model_type).geometry(config)

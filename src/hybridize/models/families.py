"""The one table of model families: where a decoder keeps its layers and its attention's tensors.

A family is a row. To support the next one, add a row to `FAMILIES` below: the surgery, the hybrid's config
and model classes, their registration with the Auto classes, and the transfer all read this table and nothing
else. Imports no torch and no transformers, so that it answers at once.

What is special of each family, and what of its attention a mixer cannot carry, is told in docs/families.md.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from hybridize.spec import AttentionGeometry

HYBRID_PREFIX = "hybrid_"


class NotInTransformersError(ValueError):
    """The installed transformers has no such family; a newer one does."""


@dataclass(frozen=True)
class Projection:
    """One projection of attention: a linear module, or some of its rows.

    Attributes:
        name: of the linear module within the attention submodule.
        rows: the rows of its weight that are meant, in their order; None for all, as they lie.
        what: what the rows are, e.g. `values`; empty if the module holds nothing else.
    """

    name: str
    rows: tuple[int, ...] | None = None
    what: str = ""


@dataclass(frozen=True)
class LogitRule:
    """What a model does to its output head's logits: `softcap · tanh(scale · logits / softcap)`.

    Attributes:
        scale: factor on the logits.
        softcap: bound on their size; None for no bound, that is `scale · logits`.
    """

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class ModelFamily:
    """One row: everything that differs between decoders, as far as surgery and transfer care.

    Attributes:
        model_type: the `model_type` in the teacher's config.json.
        config_class: name of its config class in transformers.
        model_class: name of its causal language model in transformers.
        package: the package under `transformers.models` that holds both; default: `model_type`.
        layers: path of the list of decoder layers from the causal language model.
        attention: name of the attention submodule within a decoder layer.
        q: name of the query projection within the attention submodule; likewise `k`, `v`, `o`.
        k: name of the key projection.
        v: name of the value projection.
        o: name of the output projection.
        fused: name of the one projection that holds queries, keys and values instead of `q`, `k` and `v`.
        fused_order: how its rows lie: `kind`, all queries, then all keys, then all values; or `head`, query,
            key and value of the first head, then of the second, and so on.
        norms: names of the RMS norms of queries and keys within the attention submodule.
        norm_span: what such a norm spans: each `head` by itself, or the whole `width`.
        norm_offset: what the norm adds to its weight before it multiplies by it.
        qkv_bias: whether the projections of queries, keys and values have biases, or the config's field that says so.
        output_bias: likewise for the output projection.
        cache: name of the argument by which a decoder layer hands its attention the cache.
        logit_scale: name of the config's field that multiplies the logits.
        logit_divisor: name of the config's field that divides the logits.
        logit_softcap: name of the config's field that bounds the logits.
    """

    model_type: str
    config_class: str
    model_class: str
    package: str | None = None
    layers: str = "model.layers"
    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused: str | None = None
    fused_order: Literal["kind", "head"] = "kind"
    norms: tuple[str, ...] = ()
    norm_span: Literal["head", "width"] = "head"
    norm_offset: float = 0.0
    qkv_bias: bool | str = "attention_bias"
    output_bias: bool | str = "attention_bias"
    cache: str = "past_key_values"
    logit_scale: str | None = None
    logit_divisor: str | None = None
    logit_softcap: str | None = None

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

    def attention_types(self, config: Any) -> list[str]:
        """The kind of every layer's own attention, by transformers' names, e.g. `sliding_attention`.

        By the rule of transformers' caches: as the config lists them; or else all the same, with a window if
        the config sets one, as in Mistral (arXiv 2310.06825). A hybrid's config remembers the teacher's.
        """
        listed = getattr(config, "attention_types", None) or getattr(config, "layer_types", None)
        if listed:
            return list(listed)
        kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        return [kind] * config.num_hidden_layers

    def geometry(self, config: Any) -> AttentionGeometry:
        """Read the sizes of attention from a teacher's or a hybrid's config."""
        num_heads = config.num_attention_heads
        return AttentionGeometry(
            hidden_size=config.hidden_size,
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            qkv_bias=_says(config, self.qkv_bias),
            output_bias=_says(config, self.output_bias),
            qk_norm=self.norm_span if self.norms else "none",
            norm_eps=getattr(config, "rms_norm_eps", None) or 1e-6,
        )

    def projections(self, geometry: AttentionGeometry) -> tuple[Projection, Projection, Projection, Projection]:
        """Where queries, keys, values and output have their weights within the attention submodule."""
        if self.fused is None:
            return Projection(self.q), Projection(self.k), Projection(self.v), Projection(self.o)
        rows = _fused_rows(geometry, self.fused_order)
        query, key, value = (
            Projection(self.fused, rows[i], what) for i, what in enumerate(("queries", "keys", "values"))
        )
        return query, key, value, Projection(self.o)

    def logit_rule(self, config: Any) -> LogitRule:
        """What the model does to its head's logits; a loss that applies the head itself must do it too."""
        scale = 1.0
        if self.logit_scale is not None:
            scale = getattr(config, self.logit_scale)
        if self.logit_divisor is not None:
            scale = 1 / getattr(config, self.logit_divisor)
        return LogitRule(scale, None if self.logit_softcap is None else getattr(config, self.logit_softcap))

    def teacher_config(self) -> Any:
        """The family's config class in transformers.

        Raises:
            NotInTransformersError: the installed transformers has none.
        """
        return self._find("configuration", self.config_class)

    def teacher_model(self) -> Any:
        """The family's causal language model class in transformers.

        Raises:
            NotInTransformersError: the installed transformers has none.
        """
        return self._find("modeling", self.model_class)

    def _find(self, kind: str, name: str) -> Any:
        package = self.package or self.model_type
        path = f"transformers.models.{package}.{kind}_{package}"
        try:
            return getattr(importlib.import_module(path), name)
        except (ModuleNotFoundError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and not path.startswith(error.name or "?"):
                raise
            raise NotInTransformersError(
                f"the model family {self.model_type!r} needs {name}, which the installed transformers does not "
                "have; install a newer transformers"
            ) from None


def _says(config: Any, flag: bool | str) -> bool:
    """A flag, or what the config's field of that name says; a field that it lacks says no."""
    return flag if isinstance(flag, bool) else bool(getattr(config, flag, False))


def _fused_rows(geometry: AttentionGeometry, order: str) -> tuple[tuple[int, ...], ...]:
    """Rows of queries, keys and values in a fused projection."""
    width = geometry.head_dim
    if order == "head":
        starts = [[(3 * head + part) * width for head in range(geometry.num_heads)] for part in range(3)]
        return tuple(tuple(first + i for first in heads for i in range(width)) for heads in starts)
    query, key = geometry.num_heads * width, geometry.num_kv_heads * width
    return tuple(range(query)), tuple(range(query, query + key)), tuple(range(query + key, query + 2 * key))


_QK_NORMS = ("q_norm", "k_norm")
_NO_BIAS: dict[str, Any] = {"qkv_bias": False, "output_bias": False}  # whatever the config says

FAMILIES: dict[str, ModelFamily] = {
    row.model_type: row
    for row in (
        ModelFamily("llama", "LlamaConfig", "LlamaForCausalLM"),
        ModelFamily("mistral", "MistralConfig", "MistralForCausalLM", **_NO_BIAS),
        ModelFamily("ministral", "MinistralConfig", "MinistralForCausalLM", **_NO_BIAS),
        ModelFamily("ministral3", "Ministral3Config", "Ministral3ForCausalLM", **_NO_BIAS),
        ModelFamily("qwen2", "Qwen2Config", "Qwen2ForCausalLM", qkv_bias=True, output_bias=False),
        ModelFamily("qwen3", "Qwen3Config", "Qwen3ForCausalLM", norms=_QK_NORMS),
        ModelFamily("gemma2", "Gemma2Config", "Gemma2ForCausalLM", logit_softcap="final_logit_softcapping"),
        ModelFamily(
            "gemma3_text",
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            package="gemma3",
            norms=_QK_NORMS,
            norm_offset=1.0,
            logit_softcap="final_logit_softcapping",
        ),
        ModelFamily("phi3", "Phi3Config", "Phi3ForCausalLM", fused="qkv_proj", **_NO_BIAS),
        ModelFamily("olmo2", "Olmo2Config", "Olmo2ForCausalLM", norms=_QK_NORMS, norm_span="width"),
        ModelFamily("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM"),
        ModelFamily("granite", "GraniteConfig", "GraniteForCausalLM", logit_divisor="logits_scaling"),
        ModelFamily(
            "starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM", qkv_bias="use_bias", output_bias="use_bias"
        ),
        ModelFamily("cohere2", "Cohere2Config", "Cohere2ForCausalLM", logit_scale="logit_scale"),
        ModelFamily(
            "gpt_neox",
            "GPTNeoXConfig",
            "GPTNeoXForCausalLM",
            layers="gpt_neox.layers",
            attention="attention",
            fused="query_key_value",
            fused_order="head",
            o="dense",
            cache="layer_past",
        ),
        ModelFamily("mixtral", "MixtralConfig", "MixtralForCausalLM", **_NO_BIAS),
        ModelFamily("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", norms=_QK_NORMS),
    )
}

# Families that the form of the table cannot hold, and why.
UNSERVED: dict[str, str] = {
    "gemma3": (
        "its checkpoint wraps a vision tower around the language model; save the language model alone, "
        "as Gemma3ForCausalLM with model_type 'gemma3_text'"
    ),
    "gemma3n": "some of its layers use the keys and values of others, so no layer can be replaced by itself",
    "deepseek_v2": "its keys and values are unfolded from one latent, so no mixer can take them over",
    "deepseek_v3": "its keys and values are unfolded from one latent, so no mixer can take them over",
    "qwen3_next": "it is a hybrid already: most of its layers have linear attention",
}


def find_family(model_type: str | None, place: str = "config.model_type") -> ModelFamily:
    """Find the row of a teacher's or a hybrid's model type.

    Args:
        model_type: e.g. `llama` or `hybrid_llama`.
        place: where the value stands, for the error.

    Raises:
        ValueError: the table has no such row; names the value, the rows there are, and where to add one, or
            why none can be added.
    """
    name = (model_type or "").removeprefix(HYBRID_PREFIX)
    family = FAMILIES.get(name)
    if family is None:
        known = f"use a model of one of {', '.join(FAMILIES)}"
        if name in UNSERVED:
            raise ValueError(f"{place}: the model family {model_type!r} cannot be converted: {UNSERVED[name]}; {known}")
        raise ValueError(
            f"{place}: the model family {model_type!r} is not in the table; {known}, "
            "or add a row to FAMILIES in hybridize/models/families.py"
        )
    return family


def geometry_of(config: Any) -> AttentionGeometry:
    """Read the sizes of attention from a teacher's or a hybrid's config."""
    return find_family(config.model_type).geometry(config)


def logit_rule_of(config: Any) -> LogitRule:
    """What a teacher or a hybrid does to its output head's logits, by its config."""
    return find_family(config.model_type).logit_rule(config)

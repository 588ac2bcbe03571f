"""A hybrid of Qwen 3 with gated delta nets, as Qwen 3.5's text model.

There, every query and key head of a mixer serves one or more value heads; here, every key and value head serves one or
more query heads. So each head gets a copy of its group's keys and values, after which there is one of each for all.
Attention there has an output gate, a sigmoid; zeros keep it at one half, and the output projection is doubled. Norms
there store their weights less 1 (see `norms`).

Legend: H heads, G groups, K channels of a head.
"""

from typing import Any

import torch
from torch import Tensor

from hybridize.models.exports.formats import Format, Obstacles, check_body, check_layers, resolved, shared_fields
from hybridize.models.exports.norms import split_pair, split_weight
from hybridize.models.exports.pieces import Pieces, Read, place_blocks, scaled
from hybridize.models.families import geometry_of
from hybridize.spec import AttentionSpec, GatedDeltaNetSpec

_FAMILIES = ("qwen3",)
_ALIKE = ("head_dim", "num_heads", "conv_kernel")
_HEAD, _EMBEDDING, _NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def _obstacles(config: Any) -> list[str]:
    found = Obstacles()
    if not check_body(found, config, _FAMILIES, "has no norm of each query and key head, or another body than Qwen 3"):
        return found.lines()
    fixed = {
        "conv_activation": ("silu", "SiLU follows every convolution there"),
        "l2_norm": (True, "queries and keys have length 1 there"),
        "gate": ("silu", "the gate there is SiLU"),
        "gate_bias": (False, "the gate has no bias there"),
        "output_norm": (True, "every mixer there has that norm"),
        "qk_norm": ("none", "a mixer's queries and keys have no norms with weights there"),
        "qkv_bias": (False, "a mixer has no biases there"),
        "output_bias": (False, "a mixer has no biases there"),
        "norm_eps": (config.rms_norm_eps, "all norms there add rms_norm_eps"),
    }
    check_layers(found, config, "gated_delta_net", fixed, _ALIKE)
    if getattr(config, "attention_bias", False):
        found.add("attention_bias", "attention has biases, for which vLLM's Qwen 3.5 has no tensors")
    return found.lines()


def _spec_of(config: Any) -> GatedDeltaNetSpec:
    return next(spec for spec in config.layout.layers if isinstance(spec, GatedDeltaNetSpec))


def _fields(config: Any, pieces: Pieces) -> dict[str, Any]:
    spec = _spec_of(config)
    return {
        **shared_fields(config, "gated_delta_net"),
        "tie_word_embeddings": config.tie_word_embeddings and _HEAD not in pieces.makes,
        "head_dim": geometry_of(config).head_dim,
        "attention_bias": False,
        "rope_parameters": {**config.rope_parameters, "partial_rotary_factor": 1.0},
        "linear_conv_kernel_dim": spec.conv_kernel,
        "linear_key_head_dim": spec.head_dim,
        "linear_value_head_dim": spec.head_dim,
        "linear_num_key_heads": spec.num_heads,
        "linear_num_value_heads": spec.num_heads,
        "mamba_ssm_dtype": "float32",  # of the recurrence's state in vLLM, which rounds it to the model's dtype else
    }


def _plan(config: Any, pieces: Pieces) -> list[str]:
    notes = []
    pieces.keep(_EMBEDDING)
    _plan_norm(pieces, _NORM)
    moved = _factors(pieces.stored.copy, _NORM).ne(1).any()
    if pieces.has(_HEAD) or moved:
        source = _HEAD if pieces.has(_HEAD) else _EMBEDDING
        _plan_behind(pieces, _HEAD, source, _NORM)
        if config.tie_word_embeddings and moved:
            notes.append("the output head is no longer tied to the embedding: it takes over factors of the last norm")
    num_rounded = 0
    for layer, spec in enumerate(config.layout.layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _plan_norm(pieces, f"{prefix}.{norm}.weight")
        if isinstance(spec, AttentionSpec):
            num_rounded += _plan_attention(config, pieces, prefix)
        elif isinstance(spec, GatedDeltaNetSpec):
            _plan_mixer(spec, pieces, prefix)
        for part in ("gate", "up"):
            name = f"{prefix}.mlp.{part}_proj.weight"
            norm = f"{prefix}.post_attention_layernorm.weight"
            _plan_behind(pieces, name, name, norm)
        pieces.keep(f"{prefix}.mlp.down_proj.weight")
    if num_rounded:
        notes.append(f"{num_rounded} weights of norms of queries and keys are rounded: the format stores them less 1")
    return notes


def _factors(read: Read, norm: str) -> Tensor:
    """Powers of two that a norm's weight leaves to what follows."""
    return split_weight(read(norm))[1]


def _plan_norm(pieces: Pieces, name: str) -> None:
    pieces.change(name, name, lambda weight: split_weight(weight)[0])


def _plan_value(pieces: Pieces, name: str, value: Tensor) -> None:
    """Plan a small tensor that is known already, made of the one of its name."""
    pieces.change(name, name, lambda own: value.to(own.device))


def _plan_behind(pieces: Pieces, name: str, source: str, norm: str) -> None:
    pieces.add(name, lambda read: _behind(read, norm, source))


def _behind(read: Read, norm: str, source: str) -> Tensor:
    """The weight of a linear layer that follows a norm, with the norm's factors on its columns."""
    return scaled(read(source), _factors(read, norm), source)


def _plan_attention(config: Any, pieces: Pieces, prefix: str) -> int:
    """Plan attention; return how many weights of its norms are rounded."""
    width = geometry_of(config).head_dim
    attention, norm = f"{prefix}.self_attn", f"{prefix}.input_layernorm.weight"

    def queries_and_gates(read: Read) -> Tensor:
        """Queries and, all zeros, gates, head by head."""
        heads = _behind(read, norm, f"{attention}.q_proj.weight").unflatten(0, (-1, width))
        return torch.cat([heads, torch.zeros_like(heads)], dim=1).flatten(0, 1)

    pieces.add(f"{attention}.q_proj.weight", queries_and_gates)
    for part in ("k_proj", "v_proj"):
        name = f"{attention}.{part}.weight"
        _plan_behind(pieces, name, name, norm)
    output = f"{attention}.o_proj.weight"
    pieces.change(output, output, lambda weight: scaled(weight, torch.tensor(2.0), output))
    names = [f"{attention}.{part}_norm.weight" for part in ("q", "k")]
    query, key, num_rounded = split_pair(*map(pieces.stored.copy, names))
    for name, weight in zip(names, (query, key), strict=True):
        _plan_value(pieces, name, weight)
    return num_rounded


def _plan_mixer(spec: GatedDeltaNetSpec, pieces: Pieces, prefix: str) -> None:
    num_heads, num_groups, width = resolved(spec.num_heads), resolved(spec.num_groups), resolved(spec.head_dim)
    source, target = f"{prefix}.self_attn.mixer", f"{prefix}.linear_attn"
    norm = f"{prefix}.input_layernorm.weight"
    heads, groups = num_heads * width, num_groups * width
    blocks = [head * num_groups // num_heads for head in range(num_heads)]

    def for_each_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([q, place_blocks(k, blocks, width), place_blocks(v, blocks, width)])

    pieces.add(
        f"{target}.in_proj_qkv.weight",
        lambda read: for_each_head(*(_behind(read, norm, f"{source}.{part}_proj.weight") for part in "qkv")),
    )
    pieces.add(
        f"{target}.conv1d.weight",
        lambda read: for_each_head(*read(f"{source}.conv1d.weight").split([heads, groups, groups])),
    )
    for part, name in (("z", "g"), ("b", "b"), ("a", "a")):
        _plan_behind(pieces, f"{target}.in_proj_{part}.weight", f"{source}.{name}_proj.weight", norm)
    for name, own in (
        ("A_log", "A_log"),
        ("dt_bias", "dt_bias"),
        ("norm.weight", "o_norm.weight"),
        ("out_proj.weight", "o_proj.weight"),
    ):
        pieces.keep(f"{target}.{name}", f"{source}.{own}")


QWEN = Format(
    name="qwen3.5",
    config_class="Qwen3_5TextConfig",
    architecture="Qwen3_5ForCausalLM",
    mixer="gated_delta_net",
    obstacles=_obstacles,
    fields=_fields,
    plan=_plan,
)

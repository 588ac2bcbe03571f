"""A hybrid of Llama and its like with Mamba-2, as GraniteMoeHybrid.

There, B and C come in groups of heads, and the norm behind the gate spans a group. Here, B comes in groups, C in heads,
and the norm spans a head. So each head becomes a group there, with a copy of its group's x and B. Its attention has
heads of `hidden_size / num_attention_heads`, and its mixers a multiple of `hidden_size` channels: heads of zeros, which
nothing reads, fill up both. MLPs are its shared experts, with no others beside them.

Legend: H heads, G groups, P channels of a head, N states per channel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from hybridize.models.exports.formats import Format, Obstacles, check_body, check_layers, resolved, shared_fields
from hybridize.models.exports.pieces import Pieces, Read, place_blocks
from hybridize.models.families import geometry_of
from hybridize.spec import AttentionGeometry, AttentionSpec, Mamba2Spec

Blocks = list[int | None]

_FAMILIES = ("llama", "mistral", "qwen2", "granite")
_ALIKE = ("head_dim", "state_size", "conv_kernel")
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


@dataclass(frozen=True)
class AttentionHeads:
    """Attention's heads as they are written: the teacher's at their places, None for one of zeros.

    Attributes:
        queries: query heads.
        keys: key/value heads, some of them more than once where their queries would not fit behind one.
    """

    queries: Blocks
    keys: Blocks


def attention_heads(geometry: AttentionGeometry) -> AttentionHeads | None:
    """The teacher's heads among `hidden_size / head_dim` heads, with as few key/value heads as can be.

    Returns:
        None if there is no room for them.
    """
    total, rest = divmod(geometry.hidden_size, geometry.head_dim)
    if rest or total < geometry.num_heads:
        return None
    size, num_groups = geometry.group_size, geometry.num_kv_heads
    for num_keys in range(num_groups, total + 1):
        wide, rest = divmod(total, num_keys)
        copies = -(-size // wide) if wide else 0  # of a key/value head, each with at most so many queries
        if not rest and num_groups * copies <= num_keys:
            break
    keys = [group for group in range(num_groups) for _ in range(copies)]
    queries: Blocks = []
    for place, group in enumerate(keys):
        own = range(place % copies * wide, min((place % copies + 1) * wide, size))
        queries += [group * size + i for i in own] + [None] * (wide - len(own))
    queries += [None] * (total - len(queries))
    return AttentionHeads(queries, [*keys, *[None] * (num_keys - len(keys))])


def mixer_heads(config: Any) -> tuple[int, int]:
    """How many heads every mixer is written with, and by how much `hidden_size` is multiplied to hold them."""
    specs = [spec for spec in config.layout.layers if isinstance(spec, Mamba2Spec)]
    wanted, width = max(resolved(spec.num_heads) for spec in specs), resolved(specs[0].head_dim)
    for expand in count(1):
        num_heads, rest = divmod(expand * config.hidden_size, width)
        if not rest and num_heads >= wanted:
            return num_heads, expand
    raise AssertionError


def _obstacles(config: Any) -> list[str]:
    found = Obstacles()
    norms = geometry_of(config).qk_norm != "none"
    why = "has norms of queries and keys" if norms else "has another body than a Granite"
    if not check_body(found, config, _FAMILIES, why):
        return found.lines()
    fixed = {
        "conv_activation": ("silu", "SiLU follows every convolution there"),
        "gate_norm": (True, "every mixer there has that norm"),
        "qk_norm": ("none", "B and C have no norms there"),
        "norm_eps": (config.rms_norm_eps, "all norms there add rms_norm_eps"),
    }
    check_layers(found, config, "mamba2", fixed, _ALIKE)
    geometry = geometry_of(config)
    if attention_heads(geometry) is None:
        found.add(
            "head_dim",
            f"{geometry.num_heads} query and {geometry.num_kv_heads} key/value heads of {geometry.head_dim} have no "
            f"room among heads that fill hidden_size {geometry.hidden_size}",
        )
    return found.lines()


def _has_mixer_bias(config: Any) -> bool:
    return any(
        spec.qkv_bias or spec.gate_bias or spec.output_bias
        for spec in config.layout.layers
        if isinstance(spec, Mamba2Spec)
    )


def _has_attention_bias(config: Any) -> bool:
    geometry = geometry_of(config)
    return geometry.qkv_bias or geometry.output_bias


def _fields(config: Any, pieces: Pieces) -> dict[str, Any]:
    geometry = geometry_of(config)
    heads = attention_heads(geometry)
    assert heads is not None, "there are obstacles"
    spec = next(spec for spec in config.layout.layers if isinstance(spec, Mamba2Spec))
    num_heads, expand = mixer_heads(config)
    return {
        **shared_fields(config, "mamba2"),
        **{name: getattr(config, name, 1.0) for name in _MULTIPLIERS},
        "num_attention_heads": len(heads.queries),
        "num_key_value_heads": len(heads.keys),
        "attention_multiplier": getattr(config, "attention_multiplier", geometry.head_dim**-0.5),
        "attention_bias": _has_attention_bias(config),
        "position_embedding_type": "rope",
        "rope_parameters": dict(config.rope_parameters),
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": config.intermediate_size,
        "mamba_n_heads": num_heads,
        "mamba_n_groups": num_heads,
        "mamba_d_state": spec.state_size,
        "mamba_d_head": spec.head_dim,
        "mamba_d_conv": spec.conv_kernel,
        "mamba_expand": expand,
        "mamba_conv_bias": True,
        "mamba_proj_bias": _has_mixer_bias(config),
    }


def _plan(config: Any, pieces: Pieces) -> list[str]:
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        if pieces.has(name) or name != "lm_head.weight":
            pieces.keep(name)
    for layer, spec in enumerate(config.layout.layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            pieces.keep(f"{prefix}.{norm}.weight")
        if isinstance(spec, AttentionSpec):
            _plan_attention(config, pieces, f"{prefix}.self_attn")
        elif isinstance(spec, Mamba2Spec):
            _plan_mixer(config, spec, pieces, f"{prefix}.self_attn.mixer", f"{prefix}.mamba")
        _plan_mlp(pieces, prefix)
    return _notes(config)


def _plan_mlp(pieces: Pieces, prefix: str) -> None:
    def gate_and_up(read: Read) -> Tensor:
        return torch.cat([read(f"{prefix}.mlp.{part}_proj.weight") for part in ("gate", "up")])

    pieces.add(f"{prefix}.shared_mlp.input_linear.weight", gate_and_up)
    pieces.keep(f"{prefix}.shared_mlp.output_linear.weight", f"{prefix}.mlp.down_proj.weight")


def _plan_attention(config: Any, pieces: Pieces, prefix: str) -> None:
    geometry = geometry_of(config)
    heads = attention_heads(geometry)
    assert heads is not None, "there are obstacles"
    width = geometry.head_dim

    def place(blocks: Blocks) -> Callable[[Tensor], Tensor]:
        return lambda tensor: place_blocks(tensor, blocks, width)

    for part, blocks in (("q_proj", heads.queries), ("k_proj", heads.keys), ("v_proj", heads.keys)):
        for name in (f"{prefix}.{part}.weight", f"{prefix}.{part}.bias"):
            if pieces.has(name):
                pieces.change(name, name, place(blocks))
    output = f"{prefix}.o_proj"
    weight = f"{output}.weight"
    pieces.change(weight, weight, lambda tensor: place_blocks(tensor, heads.queries, width, 1))
    if pieces.has(f"{output}.bias"):
        pieces.keep(f"{output}.bias")
    elif _has_attention_bias(config):
        pieces.change(f"{output}.bias", weight, lambda tensor: torch.zeros_like(tensor[:, 0]))


def _plan_mixer(config: Any, spec: Mamba2Spec, pieces: Pieces, source: str, target: str) -> None:
    num_heads, num_groups = resolved(spec.num_heads), resolved(spec.num_groups)
    P, N = resolved(spec.head_dim), resolved(spec.state_size)
    zeros: Blocks = [None] * (mixer_heads(config)[0] - num_heads)
    heads: Blocks = [*range(num_heads), *zeros]
    groups: Blocks = [*(head * num_groups // num_heads for head in range(num_heads)), *zeros]
    conv_widths = [num_groups * P, num_groups * N, num_heads * N]

    def conv_rows(rows: Tensor) -> Tensor:
        """Rows x | B | C, with x and B once for each head."""
        x, B, C = rows.split(conv_widths)
        return torch.cat([place_blocks(x, groups, P), place_blocks(B, groups, N), place_blocks(C, heads, N)])

    def in_proj(read: Read) -> Tensor:
        z, inner, dt = read(f"{source}.in_proj.weight").split([num_heads * P, sum(conv_widths), num_heads])
        return torch.cat([place_blocks(z, heads, P), conv_rows(inner), place_blocks(dt, heads, 1)])

    def in_bias(read: Read) -> Tensor:
        weight = read(f"{source}.in_proj.weight")[:, 0]
        biases = [torch.zeros_like(part) for part in weight.split([num_heads * P, sum(conv_widths), num_heads])]
        for part, name in enumerate(("gate_bias", "qkv_bias")):
            if pieces.has(f"{source}.{name}"):
                biases[part] = read(f"{source}.{name}").to(weight.dtype)
        z, inner, dt = biases
        return torch.cat([place_blocks(z, heads, P), conv_rows(inner), place_blocks(dt, heads, 1)])

    pieces.add(f"{target}.in_proj.weight", in_proj)
    for kind in ("weight", "bias"):
        pieces.change(f"{target}.conv1d.{kind}", f"{source}.conv1d.{kind}", conv_rows)
    for name in ("A_log", "D", "dt_bias"):
        pieces.change(f"{target}.{name}", f"{source}.{name}", lambda tensor: place_blocks(tensor, heads, 1))
    norm, output = "norm.weight", "out_proj.weight"
    pieces.change(f"{target}.{norm}", f"{source}.{norm}", lambda tensor: place_blocks(tensor, heads, P))
    pieces.change(f"{target}.{output}", f"{source}.{output}", lambda tensor: place_blocks(tensor, heads, P, 1))
    if _has_mixer_bias(config):
        pieces.add(f"{target}.in_proj.bias", in_bias)
        if pieces.has(f"{source}.out_proj.bias"):
            pieces.keep(f"{target}.out_proj.bias", f"{source}.out_proj.bias")
        else:
            pieces.change(
                f"{target}.out_proj.bias", f"{source}.{output}", lambda tensor: torch.zeros_like(tensor[:, 0])
            )


def _notes(config: Any) -> list[str]:
    geometry = geometry_of(config)
    heads = attention_heads(geometry)
    assert heads is not None, "there are obstacles"
    widest = max(resolved(spec.num_heads) for spec in config.layout.layers if isinstance(spec, Mamba2Spec))
    counts = {
        "query heads": (geometry.num_heads, len(heads.queries), "with zeros"),
        "key/value heads": (geometry.num_kv_heads, len(heads.keys), "with copies or zeros"),
        "heads of a mixer": (widest, mixer_heads(config)[0], "with zeros"),
    }
    return [f"{own} {what} become {all_}, {how}" for what, (own, all_, how) in counts.items() if own != all_]


GRANITE = Format(
    name="granite-hybrid",
    config_class="GraniteMoeHybridConfig",
    architecture="GraniteMoeHybridForCausalLM",
    mixer="mamba2",
    obstacles=_obstacles,
    fields=_fields,
    plan=_plan,
)

"""How a mixer is divided among the ranks of tensor parallelism: by groups of heads.

A rank's part of a mixer is again a mixer of the same kind, with fewer groups; the sum of what the parts give is what
the whole gives. So all there is to say is how many of each size a rank has, and which rows or columns of each tensor
are its own. Imports no vllm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize.spec import MixerSpec
from hybridize.spec.mixers import GatedDeltaNetSpec, KimiDeltaAttentionSpec, Mamba1Spec, Mamba2Spec


@dataclass(frozen=True)
class Shard:
    """How a tensor is divided.

    Attributes:
        blocks: sizes of the parts that lie behind one another along `dim`; every rank has its share of each.
        dim: the axis along which they lie.
    """

    blocks: tuple[int, ...]
    dim: int = 0


@dataclass(frozen=True)
class Once:
    """A tensor that the first rank has, and the others have as zeros, because what ranks give is summed."""


Rule = Shard | Once
Divided = Mamba1Spec | Mamba2Spec | GatedDeltaNetSpec | KimiDeltaAttentionSpec


def part_of_spec(spec: MixerSpec, num_ranks: int, place: str) -> MixerSpec:
    """The spec of what one rank has of a mixer.

    Args:
        spec: resolved.
        num_ranks: over how many ranks the mixer is divided.
        place: where the spec stands, for the error.

    Raises:
        ValueError: the ranks do not divide the groups, or a norm spans what they would divide.
    """
    if num_ranks == 1 or not isinstance(spec, Divided):
        return spec
    assert spec.num_groups is not None, "resolve the spec first"
    if spec.num_groups % num_ranks:
        fitting = [str(size) for size in range(1, spec.num_groups + 1) if spec.num_groups % size == 0]
        raise ValueError(
            f"tensor_parallel_size: {num_ranks} does not divide the {spec.num_groups} groups of {place} "
            f"({spec.type}); use one of {', '.join(fitting)}"
        )
    if spec.qk_norm == "width":
        raise ValueError(
            f"tensor_parallel_size: {num_ranks}, but the norms of queries and keys of {place} ({spec.type}) span all "
            "heads (qk_norm: width), which no rank has; use 1"
        )
    names = ("d_inner", "d_xb") if isinstance(spec, Mamba1Spec) else ("num_heads", "num_groups")
    return spec.model_copy(update={name: getattr(spec, name) // num_ranks for name in names})


def shard_rules(spec: MixerSpec) -> Mapping[str, Rule]:
    """Which parts of a mixer's tensors a rank has, by name; a tensor that is not named, every rank has whole.

    Args:
        spec: resolved, of the undivided mixer.
    """
    return _RULES[type(spec)](spec) if type(spec) in _RULES else {}


def take_part(tensor: Tensor, rule: Rule | None, rank: int, num_ranks: int) -> Tensor:
    """What a rank has of a tensor; it may share the tensor's memory.

    Raises:
        ValueError: the tensor is not as long as its blocks; names both lengths.
    """
    if rule is None or num_ranks == 1:
        return tensor
    if isinstance(rule, Once):
        return tensor if rank == 0 else torch.zeros_like(tensor)
    if tensor.ndim <= rule.dim or tensor.shape[rule.dim] != sum(rule.blocks):
        raise ValueError(f"shape {tuple(tensor.shape)}, where axis {rule.dim} should have {sum(rule.blocks)}")
    parts = [
        block.narrow(rule.dim, rank * (block.shape[rule.dim] // num_ranks), block.shape[rule.dim] // num_ranks)
        for block in tensor.split(rule.blocks, dim=rule.dim)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=rule.dim)


def _mamba1_rules(spec: Any) -> dict[str, Rule]:
    inner, grouped = spec.d_inner, spec.d_xb
    by_channel = ("dt_proj.weight", "dt_proj.bias", "conv1d.weight", "conv1d.bias", "A_log", "D", "gate_bias")
    return {
        **{name: Shard((inner,)) for name in by_channel},
        "in_proj.weight": Shard((inner, grouped, grouped, inner)),
        "qkv_bias": Shard((grouped, grouped, inner)),
        "out_proj.weight": Shard((inner,), dim=1),
        "out_proj.bias": Once(),
    }


def _mamba2_rules(spec: Any) -> dict[str, Rule]:
    heads, groups, width, states = spec.num_heads, spec.num_groups, spec.head_dim, spec.state_size
    convolved = (groups * width, groups * states, heads * states)
    return {
        **{name: Shard((heads,)) for name in ("A_log", "D", "dt_bias")},
        **{name: Shard(convolved) for name in ("conv1d.weight", "conv1d.bias", "qkv_bias")},
        **{name: Shard((heads * width,)) for name in ("gate_bias", "norm.weight")},
        "in_proj.weight": Shard((heads * width, *convolved, heads)),
        "out_proj.weight": Shard((heads * width,), dim=1),
        "out_proj.bias": Once(),
    }


def _delta_rules(spec: Any) -> dict[str, Rule]:
    heads, in_heads, in_groups = spec.num_heads, spec.num_heads * spec.head_dim, spec.num_groups * spec.head_dim
    by_channel = ("q_proj.weight", "q_proj.bias", "g_proj.weight", "f_b_proj.weight", "g_b_proj.weight", "gate_bias")
    per_channel = isinstance(spec, KimiDeltaAttentionSpec)
    return {
        **{name: Shard((heads,)) for name in ("A_log", "a_proj.weight", "b_proj.weight")},
        **{name: Shard((in_heads,)) for name in by_channel},
        **{f"{name}_proj.{part}": Shard((in_groups,)) for name in "kv" for part in ("weight", "bias")},
        "conv1d.weight": Shard((in_heads, in_groups, in_groups)),
        "dt_bias": Shard((in_heads if per_channel else heads,)),
        "o_proj.weight": Shard((in_heads,), dim=1),
        "o_proj.bias": Once(),
    }


_RULES = {
    Mamba1Spec: _mamba1_rules,
    Mamba2Spec: _mamba2_rules,
    GatedDeltaNetSpec: _delta_rules,
    KimiDeltaAttentionSpec: _delta_rules,
}

"""One layer of random attention with biases and norms, and what it is without softmax, positions and scale."""

import torch
from torch import Tensor

from hybridize.mixers import Mixer, build_mixer
from hybridize.spec import AttentionGeometry
from hybridize.transfer import TransferPlan, plan_transfer

SIZES = {"hidden_size": 24, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
PLAIN = AttentionGeometry(**SIZES)
HEAD = AttentionGeometry(**SIZES, qkv_bias=True, output_bias=True, qk_norm="head", norm_eps=0.1)
WIDTH = AttentionGeometry(**SIZES, qkv_bias=True, output_bias=True, qk_norm="width", norm_eps=0.1)


def draw_attention(geometry: AttentionGeometry) -> dict[str, Tensor]:
    """Its tensors by full name, in fp64."""
    rows = {"q": geometry.query_width, "k": geometry.kv_width, "v": geometry.kv_width, "o": geometry.hidden_size}
    tensors = {}
    for name, count in rows.items():
        columns = geometry.query_width if name == "o" else geometry.hidden_size
        tensors[f"self_attn.{name}_proj.weight"] = torch.randn(count, columns) / 5
        if geometry.output_bias if name == "o" else geometry.qkv_bias:
            tensors[f"self_attn.{name}_proj.bias"] = torch.randn(count)
        if geometry.qk_norm != "none" and name in "qk":
            width = geometry.head_dim if geometry.qk_norm == "head" else count
            tensors[f"self_attn.{name}_norm.weight"] = 1 + 0.3 * torch.randn(width)
    return {name: tensor.double() for name, tensor in tensors.items()}


def plan_from(geometry: AttentionGeometry, spec, init: str) -> TransferPlan:
    norms = () if geometry.qk_norm == "none" else ("q_norm", "k_norm")
    return plan_transfer(geometry, spec, init, norms=norms)


def build_mixer_from(plan: TransferPlan, sources: dict[str, Tensor]) -> Mixer:
    """The mixer that the plan makes, in fp64."""
    made = plan.apply(sources)
    mixer = build_mixer(plan.spec, plan.hidden_size)
    mixer.load_state_dict({name.removeprefix(f"{plan.prefix}."): tensor for name, tensor in made.items()})
    return mixer.double()


def project(hidden_BLE: Tensor, sources: dict[str, Tensor], geometry: AttentionGeometry, name: str) -> Tensor:
    """Queries, keys or values with biases and norms: [B, heads, L, head_dim]."""
    rows = hidden_BLE @ sources[f"self_attn.{name}_proj.weight"].T
    rows = rows + sources.get(f"self_attn.{name}_proj.bias", 0.0)
    heads = rows.unflatten(-1, (-1, geometry.head_dim))
    weight = sources.get(f"self_attn.{name}_norm.weight")
    if weight is not None:
        dims = -1 if geometry.qk_norm == "head" else (-2, -1)
        heads = heads / (heads.square().mean(dims, keepdim=True) + geometry.norm_eps).sqrt()
        heads = heads * (weight if geometry.qk_norm == "head" else weight.view(-1, geometry.head_dim))
    return heads.transpose(1, 2)


def linear_attention(
    hidden_BLE: Tensor,
    sources: dict[str, Tensor],
    geometry: AttentionGeometry,
    *,
    weight_of_head: list[float],
    slice_width: int | None = None,
    activation=lambda values: values,
) -> Tensor:
    """The sum over earlier tokens of (q · k) times weight times v, in the teacher's own pairing of heads.

    With a `slice_width` a slice of the values is weighted by that slice of q and k alone.
    """
    query, key, value = (project(hidden_BLE, sources, geometry, name) for name in "qkv")
    value = activation(value)
    width = slice_width or geometry.head_dim
    outputs = []
    for head in range(geometry.num_heads):
        kv_head = head // (geometry.num_heads // geometry.num_kv_heads)
        for first in range(0, geometry.head_dim, width):
            part = slice(first, first + width)
            scores_BTS = (query[:, head, :, part] @ key[:, kv_head, :, part].transpose(1, 2)).tril()
            outputs.append(weight_of_head[head] * scores_BTS @ value[:, kv_head, :, part])
    out = torch.cat(outputs, dim=-1) @ sources["self_attn.o_proj.weight"].T
    return out + sources.get("self_attn.o_proj.bias", 0.0)

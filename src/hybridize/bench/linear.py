"""The other mixers' recurrences as cases of the kernel bench, beside the attention that they replace.

Legend: B batch, L length, H heads, G groups of heads that share keys and values, K width of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from hybridize.bench.cases import Builder, Case, KernelShape, num_bytes
from hybridize.ops.gated_delta import gated_delta_rule, gated_delta_rule_step
from hybridize.ops.kimi_delta import kimi_delta_attention, kimi_delta_attention_step
from hybridize.ops.ssd import ssd, ssd_step

Inputs = tuple[Tensor, ...]
Draw = Callable[..., Tensor]


def _drawing(device: torch.device, generator: torch.Generator) -> Draw:
    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, generator=generator)

    return draw


def _attention_inputs(shape: KernelShape, dtype: torch.dtype, draw: Draw, length: int) -> Inputs:
    """Queries, keys and values: [B, L, H, K], [B, L, G, K] twice."""
    heads, groups, width = shape.attention_heads, shape.attention_groups, shape.head_dim
    leading = (shape.batch, length)
    return tuple(draw(*leading, count, width).to(dtype) for count in (heads, groups, groups))


def _delta_inputs(shape: KernelShape, dtype: torch.dtype, draw: Draw, length: int, per_channel: bool) -> Inputs:
    """Queries, keys, values, decays and strengths as a mixer makes them: unit keys, memories of 10 to 1000 tokens."""
    q, k, v = _attention_inputs(shape, dtype, draw, length)
    decays = (shape.batch, length, shape.attention_heads, *((shape.head_dim,) if per_channel else ()))
    g = -torch.exp(1.5 * draw(*decays).clamp(-1.5, 1.5) - 4.6)
    beta = torch.sigmoid(draw(shape.batch, length, shape.attention_heads))
    return normalize(q.float(), dim=-1).to(dtype), normalize(k.float(), dim=-1).to(dtype), v, g, beta


def _state(shape: KernelShape, draw: Draw) -> Tensor:
    return draw(shape.batch, shape.attention_heads, shape.head_dim, shape.head_dim)


def delta(op: Callable[..., tuple[Tensor, Tensor | None]], per_channel: bool, backend: str | None) -> Builder:
    """A delta rule over whole sequences, by a backend or by the one that the machine picks."""

    def build(shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Case | None:
        if backend is None and device.type != "cuda":
            return None  # it picks the same
        inputs = _delta_inputs(shape, dtype, _drawing(device, generator), shape.length, per_channel)

        def run(*inputs: Tensor) -> Tensor:
            return op(*inputs, backend=backend)[0]

        return Case(run, inputs, num_bytes(*inputs), num_bytes(inputs[0]), 0)

    return build


def delta_step(op: Callable[..., tuple[Tensor, Tensor]], per_channel: bool) -> Builder:
    """One token of each of many sequences."""

    def build(shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Case | None:
        few, draw = shape.one_token(), _drawing(device, generator)
        inputs = _delta_inputs(few, dtype, draw, 1, per_channel)
        state, tokens = _state(few, draw), [tensor[:, 0] for tensor in inputs]

        def run(state: Tensor, *tokens: Tensor) -> Tensor:
            return op(state, *tokens)[0]

        read, written = num_bytes(state, *tokens), num_bytes(state, tokens[0])
        return Case(run, (state, *tokens), read, written, 0, has_backward=False)

    return build


def _ssd_inputs(shape: KernelShape, dtype: torch.dtype, draw: Draw, length: int) -> Inputs:
    """x, dt, A, B and C: values, step sizes before softplus, decay rates, keys and queries."""
    q, k, v = _attention_inputs(shape, dtype, draw, length)
    dt = (0.5 * draw(shape.batch, length, shape.attention_heads) - 4.6).to(dtype)
    return v, dt, -torch.exp(draw(shape.attention_heads)), k, q


def state_space(backend: str | None) -> Builder:
    """Mamba-2's recurrence, by a backend or by the one that the machine picks."""

    def build(shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Case | None:
        if backend is None and device.type != "cuda":
            return None
        inputs = _ssd_inputs(shape, dtype, _drawing(device, generator), shape.length)

        def run(*inputs: Tensor) -> Tensor:
            return ssd(*inputs, backend=backend)[0]

        return Case(run, inputs, num_bytes(*inputs), num_bytes(inputs[4]), 0)

    return build


def state_space_step(
    shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Case | None:
    """One token of each of many sequences."""
    few, draw = shape.one_token(), _drawing(device, generator)
    x, dt, A, B, C = _ssd_inputs(few, dtype, draw, 1)
    inputs = (_state(few, draw), x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])

    def run(*inputs: Tensor) -> Tensor:
        return ssd_step(*inputs)[0]

    return Case(run, inputs, num_bytes(*inputs), num_bytes(inputs[0], inputs[5]), 0, has_backward=False)


def attention(shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Case | None:
    """Causal attention by torch's own function, grouped as the teacher's."""
    q, k, v = (
        tensor.transpose(1, 2).contiguous()
        for tensor in _attention_inputs(shape, dtype, _drawing(device, generator), shape.length)
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    pairs = shape.batch * shape.attention_heads * shape.length * (shape.length + 1) // 2
    return Case(run, (q, k, v), num_bytes(q, k, v), num_bytes(q), pairs)


LINEAR_OPS: dict[str, dict[str, Builder]] = {
    "attention": {"torch": attention},
    "ssd": {"default": state_space(None), "chunked": state_space("chunked")},
    "ssd_step": {"default": state_space_step},
    "gated_delta_rule": {
        "default": delta(gated_delta_rule, False, None),
        "chunked": delta(gated_delta_rule, False, "chunked"),
    },
    "gated_delta_rule_step": {"default": delta_step(gated_delta_rule_step, False)},
    "kimi_delta_attention": {
        "default": delta(kimi_delta_attention, True, None),
        "chunked": delta(kimi_delta_attention, True, "chunked"),
    },
    "kimi_delta_attention_step": {"default": delta_step(kimi_delta_attention_step, True)},
}

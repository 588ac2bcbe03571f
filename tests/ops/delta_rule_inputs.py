"""Inputs for the two ops with a delta rule, and how their results are compared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrence_checks import assert_same
from torch import Tensor

from hybridize.ops.gated_delta import gated_delta_rule, gated_delta_rule_step
from hybridize.ops.kimi_delta import kimi_delta_attention, kimi_delta_attention_step

LENGTHS = [1, 63, 1000]
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gated": (gated_delta_rule, gated_delta_rule_step),
    "kimi": (kimi_delta_attention, kimi_delta_attention_step),
}
EXACT = 1e-11

both_ops = pytest.mark.parametrize("op", list(OPS))


def decay_name(op: str) -> str:
    return "g_BLH" if op == "gated" else "g_BLHK"


def make_inputs(
    op: str,
    batch: int = 2,
    length: int = 63,
    heads: int = 4,
    groups: int = 2,
    key_width: int = 6,
    value_width: int = 5,
    dtype: torch.dtype = torch.float64,
    documents: int = 1,
) -> dict[str, Tensor]:
    per_channel = (key_width,) if op == "kimi" else ()
    keys = torch.randn(batch, length, groups, key_width)
    inputs = {
        "q_BLHK": torch.randn(batch, length, heads, key_width),
        "k_BLGK": keys / keys.norm(dim=-1, keepdim=True),
        "v_BLGV": torch.randn(batch, length, groups, value_width),
        decay_name(op): -torch.exp(torch.randn(batch, length, heads, *per_channel) * 2 - 2),
        "beta_BLH": torch.rand(batch, length, heads) * 1.5,
        "initial_state_BHKV": torch.randn(batch, heads, key_width, value_width),
    }
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    if documents > 1:
        starts_BL = torch.zeros(batch, length, dtype=torch.bool)
        for row in range(batch):
            starts_BL[row, torch.randperm(length)[: documents - 1]] = True
        inputs["starts_BL"] = starts_BL
    return inputs


def run(
    op: str, inputs: dict[str, Tensor], backend: str, weights: tuple[Tensor, Tensor], autocast: bool = False
) -> dict[str, Tensor]:
    """Outputs and the gradients of a random linear function of them."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        o_BLHV, state_BHKV = OPS[op][0](**inputs, return_final_state=True, backend=backend)
    value = (o_BLHV * weights[0]).sum() + (state_BHKV * weights[1]).sum()
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    grads = torch.autograd.grad(value, list(wanted.values()))
    return {"o": o_BLHV, "state": state_BHKV, **dict(zip(wanted, grads, strict=True))}


def weights_for(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    batch, length, heads, key_width = inputs["q_BLHK"].shape
    value_width = inputs["v_BLGV"].shape[-1]
    dtype = inputs["q_BLHK"].dtype
    return (
        torch.randn(batch, length, heads, value_width).to(dtype),
        torch.randn(batch, heads, key_width, value_width).to(dtype),
    )


def assert_chunked_is_reference(op: str, inputs: dict[str, Tensor], tolerance: float = EXACT) -> None:
    weights = weights_for(inputs)
    assert_same(run(op, inputs, "chunked", weights), run(op, inputs, "reference", weights), tolerance)

"""Inputs for state space duality, and its outputs with their gradients."""

import torch
from recurrence_checks import assert_same, random_starts, with_gradients
from torch import Tensor

from hybridize.ops.ssd import ssd


def make_inputs(
    batch: int = 2,
    length: int = 63,
    heads: int = 6,
    groups: int = 3,
    width: int = 4,
    states: int = 5,
    dtype: torch.dtype = torch.float64,
    documents: int = 1,
) -> dict[str, Tensor]:
    inputs = {
        "x_BLGP": torch.randn(batch, length, groups, width),
        "dt_BLH": torch.randn(batch, length, heads) * 2 - 2,
        "A_H": -torch.exp(torch.randn(heads)),
        "B_BLGN": torch.randn(batch, length, groups, states),
        "C_BLHN": torch.randn(batch, length, heads, states),
        "D_H": torch.randn(heads),
        "dt_bias_H": torch.randn(heads),
        "initial_state_BHPN": torch.randn(batch, heads, width, states),
    }
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    if documents > 1:
        inputs["starts_BL"] = random_starts(batch, length, documents)
    return inputs


def weights_for(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    batch, length, heads, states = inputs["C_BLHN"].shape
    width, dtype = inputs["x_BLGP"].shape[-1], inputs["x_BLGP"].dtype
    return torch.randn(batch, length, heads, width, dtype=dtype), torch.randn(batch, heads, width, states, dtype=dtype)


def run(inputs: dict[str, Tensor], backend: str, weights: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return with_gradients(ssd(**inputs, return_final_state=True, backend=backend), inputs, weights)


def assert_chunked_is_reference(inputs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    weights = weights_for(inputs)
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), tolerance)

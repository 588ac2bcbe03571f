"""Inputs for the selective scan on a CPU, and its outputs with their gradients."""

import torch
from recurrence_checks import assert_same, random_starts, with_gradients
from torch import Tensor

from hybridize.ops.selective_scan import selective_scan


def make_inputs(
    batch: int = 2,
    length: int = 63,
    channels: int = 24,
    states: int = 4,
    heads: int = 6,
    groups: int = 3,
    dtype: torch.dtype = torch.float64,
    documents: int = 1,
) -> dict[str, Tensor]:
    inputs = {
        "x_BLD": torch.randn(batch, length, channels),
        "dt_BLD": torch.randn(batch, length, channels) * 2 - 2,
        "A_DN": -torch.exp(torch.randn(channels, states)),
        "B_BLGN": torch.randn(batch, length, groups, states),
        "C_BLHN": torch.randn(batch, length, heads, states),
        "D_D": torch.randn(channels),
        "dt_bias_D": torch.randn(channels),
        "z_BLD": torch.randn(batch, length, channels),
        "initial_state_BDN": torch.randn(batch, channels, states),
    }
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    if documents > 1:
        inputs["starts_BL"] = random_starts(batch, length, documents)
    return inputs


def weights_for(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    (batch, _, channels), states = inputs["x_BLD"].shape, inputs["A_DN"].shape[1]
    y_weight, state_weight = torch.randn(inputs["x_BLD"].shape), torch.randn(batch, channels, states)
    return y_weight.to(inputs["x_BLD"].dtype), state_weight.to(inputs["x_BLD"].dtype)


def run(inputs: dict[str, Tensor], backend: str, weights: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return with_gradients(selective_scan(**inputs, return_final_state=True, backend=backend), inputs, weights)


def assert_chunked_is_reference(inputs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    weights = weights_for(inputs)
    assert_same(run(inputs, "chunked", weights), run(inputs, "reference", weights), tolerance)

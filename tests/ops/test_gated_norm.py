"""Norms and gates behind a recurrence: the formulas, and on a GPU the kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.ops.gated_norm import gated_norm

_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _NO_GPU])])
HEADS, WIDTH, EPS = 5, 12, 0.3


def formula(
    x: Tensor, gate: Tensor | None, bias: Tensor | None, weight: Tensor | None, act: str, first: bool
) -> Tensor:
    """Head by head, as the formulas read."""
    heads = []
    for head in range(HEADS):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        y = x[..., part]
        factor: Tensor | float = 1.0
        if gate is not None:
            open_gate = gate[..., part] + (0.0 if bias is None else bias[part])
            factor = open_gate.sigmoid() * (open_gate if act == "silu" else 1.0)
        if first:
            y = y * factor
        if weight is not None:
            y = (
                y
                / (y.pow(2).mean(dim=-1, keepdim=True) + EPS).sqrt()
                * (weight[part] if len(weight) > WIDTH else weight)
            )
        heads.append(y if first else y * factor)
    return torch.cat(heads, dim=-1)


def draw(norm: str, gate: str, bias: bool, device: str = "cpu") -> dict[str, Any]:
    wide = HEADS * WIDTH
    row = torch.randn(2, 7, 3 * wide, device=device)  # a projection's; x and gate are parts of it
    return {
        "x": row[..., wide : 2 * wide],
        "gate": None if gate == "none" else row[..., 2 * wide :],
        "bias": torch.randn(wide, device=device) if bias else None,
        "weight": {"none": None, "shared": torch.randn(WIDTH, device=device), "own": torch.randn(wide, device=device)}[
            norm
        ],
    }


def call(inputs: dict[str, Any], gate: str, first: bool) -> Tensor:
    return gated_norm(
        inputs["x"], inputs["gate"], activation="sigmoid" if gate == "sigmoid" else "silu", gate_bias_D=inputs["bias"],
        norm_weight=inputs["weight"], width=WIDTH, eps=EPS, gate_first=first,
    )  # fmt: skip


@devices
@pytest.mark.parametrize("norm", ["none", "shared", "own"])
@pytest.mark.parametrize(("gate", "bias"), [("none", False), ("silu", False), ("silu", True), ("sigmoid", True)])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_gate_are_the_formulas(
    norm: str, gate: str, bias: bool, first: bool, dtype: torch.dtype, device: str
) -> None:
    inputs = {k: t if t is None else t.to(dtype) for k, t in draw(norm, gate, bias, device).items()}
    exact = {k: t if t is None else t.double() for k, t in inputs.items()}
    got = call(inputs, gate, first)
    assert got.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), formula(**exact, act=gate, first=first), rtol=close, atol=close)
    torch.testing.assert_close(
        call(exact, gate, first), formula(**exact, act=gate, first=first), rtol=1e-12, atol=1e-12
    )


@devices
def test_gradients_are_those_of_the_formula(device: str) -> None:
    for first in (False, True):
        inputs = {k: t.double().requires_grad_() for k, t in draw("own", "silu", True, device).items()}
        got, expected = call(inputs, "silu", first), formula(**inputs, act="silu", first=first)
        weight = torch.randn_like(expected)
        grads = [
            torch.autograd.grad((y * weight).sum(), list(inputs.values()), retain_graph=True) for y in (got, expected)
        ]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 7}, "width: 7 does not divide 24 channels; use a divisor"),
        ({"gate_ND": torch.zeros(3, 12)}, r"gate_ND: shape \(3, 12\); pass \[3, 24\]"),
        ({"gate_bias_D": torch.zeros(12)}, r"gate_bias_D: shape \(12,\); pass \[24\]"),
        ({"norm_weight": torch.zeros(8)}, r"norm_weight: shape \(8,\); pass \[12\] or \[24\]"),
        ({"activation": "relu"}, "activation: 'relu' is unknown; use one of silu, sigmoid"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    options = {"gate_ND": torch.zeros(3, 24), "width": 12} | changes
    with pytest.raises(ValueError, match=f"^{message}"):
        gated_norm(torch.zeros(3, 24), **options)

"""What stands between a recurrence and a mixer's last projection: an RMS norm of each head, and a gate.

    norm first:  y = norm(x) ⊙ act(gate + bias)        (gated delta net, Kimi delta attention)
    gate first:  y = norm(x ⊙ act(gate + bias))        (Mamba-2)

The norm or the gate may be missing. On a GPU, without gradients, it is one kernel.

Legend: N rows, whatever axes they have; D channels, W channels of a head.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from hybridize.ops.launch import is_learning, takes_kernel
from hybridize.ops.precision import at_least_fp32

__all__ = ["gated_norm"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "sigmoid": torch.sigmoid}


def gated_norm(
    x_ND: Tensor,
    gate_ND: Tensor | None,
    *,
    activation: Literal["silu", "sigmoid"] = "silu",
    gate_bias_D: Tensor | None = None,
    norm_weight: Tensor | None = None,
    width: int,
    eps: float = 0.0,
    gate_first: bool = False,
) -> Tensor:
    """Normalise heads and gate, in fp32, in fp64 if x is.

    Args:
        x_ND: what a recurrence gives, [..., D].
        gate_ND: the gate before bias and activation, [..., D]; None: no gate.
        activation: the gate's.
        gate_bias_D: added to the gate, [D].
        norm_weight: [W], for all heads alike, or [D]; None: no norm.
        width: W.
        eps: added to the mean square.
        gate_first: whether what is normalised has been gated.

    Returns:
        [..., D], in x's dtype.

    Raises:
        ValueError: a shape or the activation does not fit; names the argument, the value, the remedy.
    """
    num_channels = x_ND.shape[-1]
    if num_channels % width:
        raise ValueError(f"width: {width} does not divide {num_channels} channels; use a divisor")
    if gate_ND is not None and gate_ND.shape != x_ND.shape:
        raise ValueError(f"gate_ND: shape {tuple(gate_ND.shape)}; pass {list(x_ND.shape)}, as x has")
    if gate_bias_D is not None and tuple(gate_bias_D.shape) != (num_channels,):
        raise ValueError(f"gate_bias_D: shape {tuple(gate_bias_D.shape)}; pass [{num_channels}]")
    if norm_weight is not None and tuple(norm_weight.shape) not in ((width,), (num_channels,)):
        raise ValueError(f"norm_weight: shape {tuple(norm_weight.shape)}; pass [{width}] or [{num_channels}]")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} is unknown; use one of {', '.join(_ACTIVATIONS)}")
    if gate_ND is None and norm_weight is None:
        return x_ND
    tensors = (x_ND, gate_ND, gate_bias_D, norm_weight)
    if takes_kernel(x_ND) and x_ND.numel() and not is_learning(*tensors):
        from hybridize.ops.gated_norm.triton import gated_norm_triton

        return gated_norm_triton(*tensors, activation == "silu", width, eps, gate_first)
    gate = None
    if gate_ND is not None:
        gate = at_least_fp32(gate_ND)
        if gate_bias_D is not None:
            gate = gate + at_least_fp32(gate_bias_D)
        gate = _ACTIVATIONS[activation](gate)
    if gate_first:
        gated = x_ND if gate is None else x_ND * gate
        normed = gated if norm_weight is None else _block_rms_norm(gated, norm_weight, width, eps)
        return normed.to(x_ND.dtype)
    normed = x_ND if norm_weight is None else _block_rms_norm(x_ND, norm_weight, width, eps)
    return normed if gate is None else (normed * gate).to(x_ND.dtype)


def _block_rms_norm(x_ND: Tensor, weight: Tensor, width: int, eps: float) -> Tensor:
    """Divide each block of channels by the root of its mean square (arXiv 1910.07467)."""
    exact = at_least_fp32(x_ND).unflatten(-1, (-1, width))
    scale = torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps)
    return (exact * scale * weight.to(exact.dtype).unflatten(0, (-1, width))).flatten(-2).to(x_ND.dtype)

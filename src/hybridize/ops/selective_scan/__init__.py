"""The selective scan of Mamba (arXiv 2312.00752) with per-head B and C, as in Apriel-H1 (arXiv 2511.02651).

    Δ_t = softplus(dt_t + dt_bias)
    s_t = exp(Δ_t A) ⊙ s_{t-1} + Δ_t B_t x_t
    y_t = (⟨C_t, s_t⟩ + D x_t) ⊙ SiLU(z_t)

Legend: B batch, L length, D channels (d_inner), N states per channel, H heads, G groups of heads. Channel c
is in head c // (D/H); head h reads the B of group h // (H/G).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridize.ops.launch import HAS_TRITON
from hybridize.ops.selective_scan.chunked import selective_scan_chunked
from hybridize.ops.selective_scan.reference import selective_scan_reference
from hybridize.ops.selective_scan.step import selective_scan_step, selective_scan_step_in_place

__all__ = ["BACKENDS", "selective_scan", "selective_scan_step", "selective_scan_step_in_place"]


def _selective_scan_triton(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    if not HAS_TRITON:
        raise ValueError("backend: 'triton' needs Triton, which is not installed; use 'chunked', or None")
    from hybridize.ops.selective_scan.triton import selective_scan_triton

    return selective_scan_triton(*args, **options)


BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": selective_scan_reference,
    "chunked": selective_scan_chunked,
    "triton": _selective_scan_triton,
}

# The backend of each device type; others, and inputs in fp64 or without Triton, take "chunked".
_BACKEND_OF_DEVICE: dict[str, str] = {"cuda": "triton"} if HAS_TRITON else {}


def selective_scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    *,
    D_D: Tensor | None = None,
    dt_bias_D: Tensor | None = None,
    dt_softplus: bool = True,
    z_BLD: Tensor | None = None,
    starts_BL: Tensor | None = None,
    initial_state_BDN: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scan whole sequences, several documents in a row if need be.

    States and sums are in fp32, in fp64 if x is. Every tensor but `starts_BL` gets its gradient (once; there
    is no double backward).

    Args:
        x_BLD: inputs, [B, L, D]; fp64, fp32, bf16 or fp16.
        dt_BLD: step sizes before bias and softplus, [B, L, D].
        A_DN: -exp(A_log), [D, N]; negative.
        B_BLGN: input projections, one per group, [B, L, G, N].
        C_BLHN: read-outs, one per head, [B, L, H, N].
        D_D: weight of the skip connection, [D].
        dt_bias_D: added to dt, [D].
        dt_softplus: whether softplus makes the step size of dt; without it dt must not be negative.
        z_BLD: gate, [B, L, D].
        starts_BL: bool, True at the first token of each document, [B, L]: the state, the initial one
            included, is zero before that token. None: one document, going on from the initial state.
        initial_state_BDN: state before the first token, [B, D, N]; zero by default.
        return_final_state: whether to return the state after the last token.
        backend: `reference`, `chunked`, `triton` (a GPU, not fp64), or None to pick by device.

    Returns:
        y [B, L, D] in x's dtype, and the final state [B, D, N] in fp32 (fp64) or None.

    Raises:
        ValueError: a shape, a dtype or the backend does not fit; names the argument, the value, the remedy.
    """
    batch, length, num_channels, num_states = _sizes(x_BLD, A_DN)
    _check_shape("dt_BLD", dt_BLD, (batch, length, num_channels))
    _check_heads(B_BLGN, C_BLHN, (batch, length), num_channels, num_states)
    _check_shape("D_D", D_D, (num_channels,))
    _check_shape("dt_bias_D", dt_bias_D, (num_channels,))
    _check_shape("z_BLD", z_BLD, (batch, length, num_channels))
    _check_shape("starts_BL", starts_BL, (batch, length))
    _check_shape("initial_state_BDN", initial_state_BDN, (batch, num_channels, num_states))
    if not x_BLD.is_floating_point():
        raise ValueError(f"x_BLD: dtype {x_BLD.dtype} is not a float; pass fp32, bf16, fp16 or fp64")
    if starts_BL is not None and starts_BL.dtype != torch.bool:
        raise ValueError(f"starts_BL: dtype {starts_BL.dtype}; pass a bool tensor, True at each first token")
    if backend is None:
        exact = x_BLD.dtype == torch.float64
        backend = "chunked" if exact else _BACKEND_OF_DEVICE.get(x_BLD.device.type, "chunked")
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; use one of {', '.join(BACKENDS)}, or None")
    y_BLD, state_BDN = BACKENDS[backend](
        x_BLD,
        dt_BLD,
        A_DN,
        B_BLGN,
        C_BLHN,
        D_D=D_D,
        dt_bias_D=dt_bias_D,
        dt_softplus=dt_softplus,
        z_BLD=z_BLD,
        starts_BL=starts_BL,
        initial_state_BDN=initial_state_BDN,
    )
    return y_BLD, state_BDN if return_final_state else None


def _sizes(x_BLD: Tensor, A_DN: Tensor) -> tuple[int, int, int, int]:
    if x_BLD.ndim != 3 or x_BLD.numel() == 0:
        raise ValueError(f"x_BLD: shape {tuple(x_BLD.shape)}; pass [batch, length, channels], none of them zero")
    batch, length, num_channels = x_BLD.shape
    if A_DN.ndim != 2 or A_DN.shape[0] != num_channels:
        raise ValueError(f"A_DN: shape {tuple(A_DN.shape)}; pass [{num_channels}, states], as x has channels")
    return batch, length, num_channels, A_DN.shape[1]


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; pass {list(shape)}, to go with x and A")


def _check_heads(B_BLGN: Tensor, C_BLHN: Tensor, leading: tuple[int, int], num_channels: int, num_states: int) -> None:
    for name, tensor, what in (("B_BLGN", B_BLGN, "groups"), ("C_BLHN", C_BLHN, "heads")):
        if tensor.ndim != 4 or tuple(tensor.shape[:2]) != leading or tensor.shape[3] != num_states:
            expected = f"[{leading[0]}, {leading[1]}, {what}, {num_states}]"
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; pass {expected}, to go with x and A")
    num_groups, num_heads = B_BLGN.shape[2], C_BLHN.shape[2]
    if num_heads == 0 or num_channels % num_heads:
        raise ValueError(f"C_BLHN: {num_heads} heads do not divide {num_channels} channels; use a divisor")
    if num_groups == 0 or num_heads % num_groups:
        raise ValueError(f"B_BLGN: {num_groups} groups do not divide {num_heads} heads; use a divisor")

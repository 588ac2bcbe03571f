"""State space duality, the recurrence of Mamba-2 (SSD, arXiv 2405.21060), with grouped x and B and per-head C.

    Δ_t = softplus(dt_t + dt_bias)
    S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t B_tᵀ
    y_t = S_t C_t + D x_t

Legend: B batch, L length, H heads, G groups of heads, P channels of a head, N states per channel. Head h reads the x
and the B of group h // (H/G); its step size, A, C and D are its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hybridize.ops.ssd.chunked import ssd_chunked
from hybridize.ops.ssd.fla import fla_refuses, ssd_fla
from hybridize.ops.ssd.reference import ssd_reference
from hybridize.ops.ssd.step import ssd_step, ssd_step_in_place

__all__ = ["BACKENDS", "ssd", "ssd_step", "ssd_step_in_place"]

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": ssd_reference,
    "chunked": ssd_chunked,
    "fla": ssd_fla,
}


def ssd(
    x_BLGP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = True,
    starts_BL: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scan whole sequences, several documents in a row if need be.

    States, decays and sums are in fp32, in fp64 if x is; on a GPU the products of bf16 inputs run in bf16 with fp32
    sums, as Mamba-2's own kernels have it. Every tensor but `starts_BL` gets its gradient (once; there is no double
    backward).

    Args:
        x_BLGP: inputs, one per group, [B, L, G, P]; fp64, fp32, bf16 or fp16; any strides, as B and C.
        dt_BLH: step sizes before bias and softplus, [B, L, H].
        A_H: -exp(A_log), [H]; negative.
        B_BLGN: input projections, one per group, [B, L, G, N].
        C_BLHN: read-outs, one per head, [B, L, H, N].
        D_H: weight of the skip connection, [H].
        dt_bias_H: added to dt, [H].
        dt_softplus: whether softplus makes the step size of dt; without it dt must not be negative.
        starts_BL: bool, True at the first token of each document, [B, L]: the state, the initial one included, is
            zero before that token. None: one document, going on from the initial state.
        initial_state_BHPN: state before the first token, [B, H, P, N]; zero by default.
        return_final_state: whether to return the state after the last token.
        backend: `reference`, `chunked`, `fla` (kernels of flash-linear-attention), or None: `fla` for bf16 and fp16 on
            a GPU where that can serve, else `chunked`.

    Returns:
        y [B, L, H, P] in x's dtype, and the final state [B, H, P, N] in fp32 (fp64) or None.

    Raises:
        ValueError: a shape, a dtype or the backend does not fit; names the argument, the value, the remedy.
    """
    batch, length, num_heads = _sizes(x_BLGP, B_BLGN, C_BLHN)
    _check_shape("dt_BLH", dt_BLH, (batch, length, num_heads))
    _check_shape("A_H", A_H, (num_heads,))
    _check_shape("D_H", D_H, (num_heads,))
    _check_shape("dt_bias_H", dt_bias_H, (num_heads,))
    _check_shape("starts_BL", starts_BL, (batch, length))
    _check_shape("initial_state_BHPN", initial_state_BHPN, (batch, num_heads, x_BLGP.shape[3], C_BLHN.shape[3]))
    if not x_BLGP.is_floating_point():
        raise ValueError(f"x_BLGP: dtype {x_BLGP.dtype} is not a float; pass fp32, bf16, fp16 or fp64")
    if starts_BL is not None and starts_BL.dtype != torch.bool:
        raise ValueError(f"starts_BL: dtype {starts_BL.dtype}; pass a bool tensor, True at each first token")
    # On a GPU the question would stall it.
    if A_H.device.type == "cpu" and not torch.compiler.is_compiling() and bool((A_H > 0).any()):
        raise ValueError("A_H: has positive entries, a growing state; pass -exp(A_log)")
    tensors = (x_BLGP, dt_BLH, A_H, B_BLGN, C_BLHN, D_H, dt_bias_H, initial_state_BHPN)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if backend is None:
        backend = "chunked" if fla_refuses(x_BLGP, B_BLGN.shape[3], differentiable) else "fla"
    elif backend == "fla" and (reason := fla_refuses(x_BLGP, B_BLGN.shape[3], differentiable)):
        raise ValueError(f"backend: 'fla' cannot serve here, since {reason}; use 'chunked' or None")
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; use one of {', '.join(BACKENDS)}, or None")
    y_BLHP, state_BHPN = BACKENDS[backend](
        x_BLGP,
        dt_BLH,
        A_H,
        B_BLGN,
        C_BLHN,
        D_H=D_H,
        dt_bias_H=dt_bias_H,
        dt_softplus=dt_softplus,
        starts_BL=starts_BL,
        initial_state_BHPN=initial_state_BHPN,
    )
    return y_BLHP, state_BHPN if return_final_state else None


def _sizes(x_BLGP: Tensor, B_BLGN: Tensor, C_BLHN: Tensor) -> tuple[int, int, int]:
    if x_BLGP.ndim != 4 or x_BLGP.numel() == 0:
        raise ValueError(f"x_BLGP: shape {tuple(x_BLGP.shape)}; pass [batch, length, groups, channels], none of zero")
    batch, length, num_groups, _ = x_BLGP.shape
    if C_BLHN.ndim != 4 or tuple(C_BLHN.shape[:2]) != (batch, length) or not C_BLHN.shape[3]:
        raise ValueError(f"C_BLHN: shape {tuple(C_BLHN.shape)}; pass [{batch}, {length}, heads, states], to go with x")
    num_heads, num_states = C_BLHN.shape[2:]
    if num_heads == 0 or num_heads % num_groups:
        raise ValueError(f"C_BLHN: {num_heads} heads are no multiple of x's {num_groups} groups; use a multiple")
    expected = (batch, length, num_groups, num_states)
    if tuple(B_BLGN.shape) != expected:
        raise ValueError(f"B_BLGN: shape {tuple(B_BLGN.shape)}; pass {list(expected)}, to go with x and C")
    return batch, length, num_heads


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; pass {list(shape)}, to go with x and C")

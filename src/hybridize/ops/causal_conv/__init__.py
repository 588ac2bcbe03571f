"""The short causal depthwise convolution before a recurrence, on packed documents, with its window as state.

    y_t = SiLU(bias + Σ_k weight_k ⊙ x_{t-K+1+k}),   x_s = 0 before the first token of t's document

Legend: B batch, L length, X channels of the input, D channels of the output, K taps. D = X, unless blocks of the
input's channels are repeated before the convolution, as Mamba-1 with grouped x does (arXiv 2511.02651).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybridize.ops.causal_conv.checks import check_convolution, check_window
from hybridize.ops.causal_conv.reference import causal_conv_reference
from hybridize.ops.causal_conv.shifted import causal_conv_shifted, repeat_blocks, with_window
from hybridize.ops.causal_conv.step import causal_conv_step, causal_conv_step_in_place
from hybridize.ops.launch import HAS_TRITON

__all__ = ["BACKENDS", "causal_conv", "causal_conv_step", "causal_conv_step_in_place"]


def _causal_conv_triton(*args: Tensor | None, **options: Any) -> Tensor:
    if not HAS_TRITON:
        raise ValueError("backend: 'triton' needs Triton, which is not installed; use 'shifted', or None")
    from hybridize.ops.causal_conv.triton import causal_conv_triton

    return causal_conv_triton(*args, **options)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": causal_conv_reference,
    "shifted": causal_conv_shifted,
    "triton": _causal_conv_triton,
}

# The backend of each device type; others, and inputs in fp64 or without Triton, take "shifted".
_BACKEND_OF_DEVICE: dict[str, str] = {"cuda": "triton"} if HAS_TRITON else {}


def causal_conv(
    x_BLX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    repeat: tuple[int, int] | None = None,
    starts_BL: Tensor | None = None,
    window_BDK: Tensor | None = None,
    return_window: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve each channel with its own K taps, causally, within documents.

    Sums are in fp32, in fp64 if x is. Every tensor but `starts_BL` gets its gradient (once).

    Args:
        x_BLX: inputs, [B, L, X]; fp64, fp32, bf16 or fp16; any strides.
        weight_DK: taps, [D, K], oldest first; the last one meets the token itself.
        bias_D: added to the sum, [D].
        activation: "silu" or None.
        repeat: (width, times): each block of `width` input channels is repeated `times` in a row, so that
            D = X times; None: D = X.
        starts_BL: bool, True at the first token of each document, [B, L]: no tap reaches from such a token or
            after it to before it, nor into the window. None: one document, going on from the window.
        window_BDK: the K inputs before the first token, [B, D, K], oldest first; zeros by default.
        return_window: whether to return the last K inputs.
        backend: `reference`, `shifted`, `triton` (a GPU, not fp64), or None to pick by device.

    Returns:
        y [B, L, D] in x's dtype, and the window after the last token, [B, D, K] in x's dtype, zero where there were
        no inputs or inputs of another document; or None.

    Raises:
        ValueError: a shape, a dtype or an option does not fit; names the argument, the value, the remedy.
    """
    times = check_convolution(x_BLX.shape, weight_DK, bias_D, activation, repeat)
    if x_BLX.ndim != 3:
        raise ValueError(f"x_BLX: shape {tuple(x_BLX.shape)}; pass [batch, length, channels]")
    if starts_BL is not None and (starts_BL.dtype != torch.bool or starts_BL.shape != x_BLX.shape[:2]):
        got = f"{starts_BL.dtype} of shape {tuple(starts_BL.shape)}"
        raise ValueError(f"starts_BL: {got}; pass a bool tensor of shape {list(x_BLX.shape[:2])}")
    check_window(window_BDK, (x_BLX.shape[0], *weight_DK.shape))
    if backend is None:
        exact = x_BLX.dtype == torch.float64
        backend = "shifted" if exact else _BACKEND_OF_DEVICE.get(x_BLX.device.type, "shifted")
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; use one of {', '.join(BACKENDS)}, or None")
    blocks = (x_BLX.shape[-1] // times if repeat is None else repeat[0], times)
    y_BLD = BACKENDS[backend](
        x_BLX,
        weight_DK,
        bias_D,
        activation=activation,
        repeat=blocks,
        starts_BL=starts_BL,
        window_BDK=window_BDK,
    )
    if not return_window:
        return y_BLD, None
    return y_BLD, _last_window(x_BLX, window_BDK, starts_BL, weight_DK.shape[1], blocks)


def _last_window(
    x_BLX: Tensor, window_BDK: Tensor | None, starts_BL: Tensor | None, num_taps: int, repeat: tuple[int, int]
) -> Tensor:
    last_BKX = with_window(x_BLX[:, -num_taps:], window_BDK, num_taps, repeat)[:, -num_taps:]
    if starts_BL is not None:
        # An input counts if no document starts after it.
        starts_BK = pad(starts_BL[:, -num_taps:], (num_taps, 0))[:, -num_taps:].long()
        later_BK = starts_BK.flip(1).cumsum(dim=1).flip(1) - starts_BK
        last_BKX = last_BKX.masked_fill((later_BK > 0).unsqueeze(-1), 0.0)
    return repeat_blocks(last_BKX, repeat).transpose(1, 2).contiguous()

"""The causal depthwise convolution in plain torch: a sum of shifted inputs, one term per tap.

Legend: B batch, L length, X channels of the input, D channels of the output, K taps; the output's channels are G
groups of R repetitions of W channels, the input's G groups of W.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, silu


def causal_conv_shifted(
    x_BLX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    activation: str | None,
    repeat: tuple[int, int],
    starts_BL: Tensor | None,
    window_BDK: Tensor | None,
) -> Tensor:
    """Convolve whole sequences; the repeated input is never held, and a tap into another document is masked.

    The arguments are those of `hybridize.ops.causal_conv.causal_conv`, already checked, with `repeat` always given.

    Returns:
        y of shape [B, L, D] in x's dtype.
    """
    width, times = repeat
    num_taps, length = weight_DK.shape[1], x_BLX.shape[1]
    dtype = torch.promote_types(x_BLX.dtype, torch.float32)
    past_BLX = with_window(x_BLX, window_BDK, num_taps, repeat).to(dtype)
    document_BL = None
    if starts_BL is not None:
        document_BL = pad(starts_BL.cumsum(dim=1), (num_taps, 0))
    taps_GRWK = weight_DK.to(dtype).unflatten(0, (-1, times, width))
    sum_BLGRW: Tensor | None = None if bias_D is None else bias_D.to(dtype).unflatten(0, (-1, times, width))
    for tap in range(num_taps):
        first = tap + 1  # the last tap reads the token itself, `past` is longer by the number of taps
        shifted_BLX = past_BLX[:, first : first + length]
        if document_BL is not None and first < num_taps:
            other_BL = document_BL[:, first : first + length] != document_BL[:, num_taps:]
            shifted_BLX = shifted_BLX.masked_fill(other_BL.unsqueeze(-1), 0.0)
        shifted_BLG1W = shifted_BLX.unflatten(-1, (-1, 1, width))
        tap_GRW = taps_GRWK[..., tap]
        sum_BLGRW = shifted_BLG1W * tap_GRW if sum_BLGRW is None else torch.addcmul(sum_BLGRW, shifted_BLG1W, tap_GRW)
    assert sum_BLGRW is not None
    y_BLD = sum_BLGRW.flatten(2)
    return (silu(y_BLD) if activation == "silu" else y_BLD).to(x_BLX.dtype)


def with_window(x_BLX: Tensor, window_BDK: Tensor | None, num_taps: int, repeat: tuple[int, int]) -> Tensor:
    """Put the K inputs before the first one (zeros if there is no window) in front of x: [B, K + L, X]."""
    if window_BDK is None:
        return pad(x_BLX, (0, 0, num_taps, 0))
    width, times = repeat
    window_BXK = window_BDK.unflatten(1, (-1, times, width))[:, :, 0].flatten(1, 2)
    return torch.cat([window_BXK.transpose(1, 2).to(x_BLX.dtype), x_BLX], dim=1)


def repeat_blocks(x: Tensor, repeat: tuple[int, int]) -> Tensor:
    """Repeat blocks of the last axis: [..., X] -> [..., D]."""
    width, times = repeat
    return x.unflatten(-1, (-1, width)).repeat_interleave(times, dim=-2).flatten(-2)

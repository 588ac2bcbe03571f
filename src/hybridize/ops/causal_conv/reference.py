"""The causal depthwise convolution as its formula says: a loop over tokens and taps, the truth.

Legend: B batch, L length, X channels of the input, D channels of the output, K taps.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu


def causal_conv_reference(
    x_BLX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    activation: str | None,
    repeat: tuple[int, int],
    starts_BL: Tensor | None,
    window_BDK: Tensor | None,
) -> Tensor:
    """Convolve one token after the other; slow, differentiable by autograd alone.

    The arguments are those of `hybridize.ops.causal_conv.causal_conv`, already checked, with `repeat` always given.

    Returns:
        y of shape [B, L, D] in x's dtype.
    """
    width, times = repeat
    dtype = torch.promote_types(x_BLX.dtype, torch.float32)
    x_BLD = x_BLX.to(dtype).unflatten(-1, (-1, width)).repeat_interleave(times, dim=2).flatten(2)
    batch, length, num_channels = x_BLD.shape
    num_taps = weight_DK.shape[1]
    if window_BDK is None:
        window_BDK = x_BLD.new_zeros(batch, num_channels, num_taps)
    # The repetitions of a channel hold the same inputs; the first one speaks for all.
    window_BGRWK = window_BDK.unflatten(1, (-1, times, width))[:, :, :1].expand(-1, -1, times, -1, -1)
    past = list(window_BGRWK.flatten(1, 3).to(x_BLX.dtype).to(dtype).unbind(-1))
    y_steps = []
    for t in range(length):
        if starts_BL is not None:
            past = [tensor.masked_fill(starts_BL[:, t, None], 0.0) for tensor in past]
        past = [*past[1:], x_BLD[:, t]]
        y_BD = torch.zeros_like(past[-1])
        for tap in range(num_taps):
            y_BD = y_BD + weight_DK[:, tap].to(dtype) * past[tap]
        y_steps.append(y_BD if bias_D is None else y_BD + bias_D.to(dtype))
    y_BLD = torch.stack(y_steps, dim=1)
    return (silu(y_BLD) if activation == "silu" else y_BLD).to(x_BLX.dtype)

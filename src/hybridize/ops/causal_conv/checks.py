"""Checks of what is handed to a causal convolution, for sequences and for steps.

Legend: B batch, D channels of the output, K taps.
"""

import torch
from torch import Tensor


def check_convolution(
    x_shape: torch.Size,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    activation: str | None,
    repeat: tuple[int, int] | None,
) -> int:
    """Check what sequences and steps take alike.

    Returns:
        How often each channel is repeated.

    Raises:
        ValueError: a shape or an option does not fit; names the argument, the value, the remedy.
    """
    width, times = repeat or (1, 1)
    if width < 1 or times < 1 or x_shape[-1] % width:
        raise ValueError(f"repeat: {repeat} does not cut {x_shape[-1]} channels into blocks; use a divisor as width")
    if weight_DK.ndim != 2 or weight_DK.shape[0] != x_shape[-1] * times or not weight_DK.shape[1]:
        expected = f"[{x_shape[-1] * times}, taps]"
        raise ValueError(f"weight_DK: shape {tuple(weight_DK.shape)}; pass {expected}, to go with x and repeat")
    if bias_D is not None and bias_D.shape != weight_DK.shape[:1]:
        raise ValueError(f"bias_D: shape {tuple(bias_D.shape)}; pass [{weight_DK.shape[0]}], to go with the taps")
    if activation not in ("silu", None):
        raise ValueError(f"activation: {activation!r} is unknown; use 'silu' or None")
    return times


def check_window(window_BDK: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check the shape of a window.

    Raises:
        ValueError: it is another one; names both and the remedy.
    """
    if window_BDK is not None and tuple(window_BDK.shape) != shape:
        raise ValueError(f"window_BDK: shape {tuple(window_BDK.shape)}; pass {list(shape)}, to go with x and the taps")

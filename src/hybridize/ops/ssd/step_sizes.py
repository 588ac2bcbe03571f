"""The step sizes of a state space: what comes out of a projection, made positive.

Legend: B batch, L length, H heads.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def step_sizes(dt_BLH: Tensor, dt_bias_H: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """Δ in `dtype`: dt with its bias, through softplus if so asked; of [B, L, H], or of [B, H] for one token."""
    delta_BLH = dt_BLH.to(dtype)
    if dt_bias_H is not None:
        delta_BLH = delta_BLH + dt_bias_H.to(dtype)
    return softplus(delta_BLH) if dt_softplus else delta_BLH

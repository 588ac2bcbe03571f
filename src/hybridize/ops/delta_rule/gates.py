"""What a mixer's projections become before a delta rule reads them: decays, and keys of length 1.

Legend: H heads, K width of queries and keys; leading axes are free.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hybridize.ops.precision import at_least_fp32

L2_EPS = 1e-6
"""Added to the squared length of queries and keys before they are scaled, as the papers' kernels do."""


def log_decays(inputs: Tensor, A_log_H: Tensor, dt_bias: Tensor, per_channel: bool) -> Tensor:
    """Logarithms of the decays, -exp(A_log) softplus(inputs + dt_bias), at least in fp32.

    Args:
        inputs: [..., H], or [..., H K].
        A_log_H: logarithms of the heads' rates, [H].
        dt_bias: of the inputs' last axis.
        per_channel: whether there is a decay for every channel of the keys.

    Returns:
        [..., H], or [..., H, K].
    """
    rate_H = -torch.exp(at_least_fp32(A_log_H))
    step = softplus(at_least_fp32(inputs) + at_least_fp32(dt_bias))
    if per_channel:
        return rate_H.unsqueeze(-1) * step.unflatten(-1, (rate_H.shape[0], -1))
    return rate_H * step


def unit_length(tensor: Tensor) -> Tensor:
    """The last axis scaled to length 1, computed in fp32 at least, in the tensor's dtype."""
    exact = at_least_fp32(tensor)
    return (exact * torch.rsqrt(exact.square().sum(dim=-1, keepdim=True) + L2_EPS)).to(tensor.dtype)

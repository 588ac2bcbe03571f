"""In which precision decays, gates and norms are computed."""

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

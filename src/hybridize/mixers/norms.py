"""RMS norms of blocks of channels, as mixers need them: of each head by itself, or of all at once.

Legend: D channels, W channels of a block.
"""

import torch
from torch import Tensor, nn

from hybridize.ops.gated_norm import gated_norm


class BlockRMSNorm(nn.Module):
    """Divides each block of channels by the root of its mean square (arXiv 1910.07467), in fp32 at least.

    Args:
        width: W, channels that are normalised together.
        num_weights: entries of the weight: W, where all blocks share it, or D, one for each channel.
        eps: what is added to the mean square.
    """

    def __init__(self, width: int, num_weights: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_weights))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, [..., D]; the result has its dtype."""
        return gated_norm(x, None, norm_weight=self.weight, width=self.width, eps=self.eps)

"""Projections of one input as one product, for decode steps, where many small products cost more than a large one.

Legend: B batch, E width of the input, N outputs of all projections together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# The outputs are rounded up to a multiple of this, with rows of zeros, since products of odd width are slow.
_ALIGNMENT = 64


class PackedLinears:
    """Linear layers whose weights lie behind one another in one matrix; each layer's own weight is a part of it.

    So layers and matrix cannot get out of step while the weights change in place, as by loading. Whatever else gives a
    layer another weight (moving to another device, say) unpacks: the layers are then called one by one.

    Args:
        layers: of the same input, dtype and device. Their weights move.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        first = layers[0].weight
        num_rows = -(-sum(layer.out_features for layer in layers) // _ALIGNMENT) * _ALIGNMENT
        self._weight_NE = first.new_zeros(num_rows, first.shape[1])
        has_bias = any(layer.bias is not None for layer in layers)
        self._bias_N = first.new_zeros(num_rows) if has_bias else None
        self._places = []
        start = 0
        for layer in layers:
            rows = slice(start, start + layer.out_features)
            _move(layer.weight, self._weight_NE[rows])
            if layer.bias is not None and self._bias_N is not None:
                _move(layer.bias, self._bias_N[rows])
            self._places.append((layer.weight.data_ptr(), None if layer.bias is None else layer.bias.data_ptr()))
            start = rows.stop

    def hold(self, layers: Sequence[nn.Linear]) -> bool:
        """Whether these are the layers that were packed, with the weights that they had then."""
        places = [(la.weight.data_ptr(), None if la.bias is None else la.bias.data_ptr()) for la in layers]
        return places == self._places

    def __call__(self, x_BE: Tensor) -> Tensor:
        """All projections of x, [B, N], and what fills them up to the alignment."""
        return linear(x_BE, self._weight_NE, self._bias_N)


def project_together(
    packed: PackedLinears | None, layers: Sequence[nn.Linear], x_BE: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Projections of x, as one product if they are packed.

    Returns:
        All of them behind one another, [B, N] or more, and each, a part of that.
    """
    if packed is not None and packed.hold(layers):
        together_BN = packed(x_BE)
    else:
        together_BN = torch.cat([layer(x_BE) for layer in layers], dim=-1)
    sizes = [layer.out_features for layer in layers]
    return together_BN, list(together_BN[:, : sum(sizes)].split(sizes, dim=-1))


def _move(parameter: nn.Parameter, place: Tensor) -> None:
    place.copy_(parameter)
    parameter.data = place

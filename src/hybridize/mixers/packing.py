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
    layer another weight (moving to another device, say) unpacks: the layers are then called one by one. So they are if
    one of them was replaced, as by an adapter that wraps it, or has forward hooks.

    Args:
        layers: of the same input, dtype and device. Their weights move.

    Raises:
        ValueError: their dtypes differ; names both.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        first = layers[0].weight
        for parameter in (parameter for layer in layers for parameter in (layer.weight, layer.bias)):
            if parameter is not None and parameter.dtype != first.dtype:
                raise ValueError(f"layers: dtypes {first.dtype} and {parameter.dtype}; cast them to one before packing")
        self._layers = list(layers)
        num_rows = -(-sum(layer.out_features for layer in layers) // _ALIGNMENT) * _ALIGNMENT
        self._weight_NE = first.new_zeros(num_rows, first.shape[1])
        has_bias = any(layer.bias is not None for layer in layers)
        self._bias_N = first.new_zeros(num_rows) if has_bias else None
        self._first_rows: list[int] = []
        self._biased_rows: set[int] = set()
        start = 0
        for layer in layers:
            rows = slice(start, start + layer.out_features)
            _move(layer.weight, self._weight_NE[rows])
            if layer.bias is not None and self._bias_N is not None:
                _move(layer.bias, self._bias_N[rows])
                self._biased_rows.add(start)
            self._first_rows.append(start)
            start = rows.stop

    def hold(self, layers: Sequence[nn.Linear]) -> bool:
        """Whether these are the layers that were packed, with the weights that they had then, and without hooks."""
        if len(layers) != len(self._layers):
            return False
        weights = self._weight_NE.data_ptr()
        biases = 0 if self._bias_N is None else self._bias_N.data_ptr()
        row_bytes, item_bytes = self._weight_NE.stride(0) * self._weight_NE.itemsize, self._weight_NE.itemsize
        for layer, known, row in zip(layers, self._layers, self._first_rows, strict=True):
            if layer is not known or layer._forward_hooks or layer._forward_pre_hooks:
                return False
            if layer.weight.data_ptr() != weights + row * row_bytes:
                return False
            if (layer.bias is None) != (row not in self._biased_rows):
                return False
            if layer.bias is not None and layer.bias.data_ptr() != biases + row * item_bytes:
                return False
        return True

    def __call__(self, x_BE: Tensor) -> Tensor:
        """All projections of x, [B, N], and what fills them up to the alignment."""
        return linear(x_BE, self._weight_NE, self._bias_N)


def project_together(
    packed: PackedLinears | None, layers: Sequence[nn.Linear], x_BE: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Projections of x, as one product if they are packed.

    Returns:
        All of them behind one another, [B, N] or more, and each.
    """
    if packed is not None and packed.hold(layers):
        together_BN = packed(x_BE)
    else:
        parts = [layer(x_BE) for layer in layers]
        return torch.cat(parts, dim=-1), parts
    sizes = [layer.out_features for layer in layers]
    return together_BN, list(together_BN[:, : sum(sizes)].split(sizes, dim=-1))


def _move(parameter: nn.Parameter, place: Tensor) -> None:
    place.copy_(parameter)
    parameter.data = place

"""A mixer's last projection, made to write where vLLM wants the layer's output. Imports no vllm.

vLLM gives a layer the tensor to fill, at an address that its CUDA graphs know. A projection that returned a tensor of
its own would have to be copied there, in each layer and at every decode step.

Legend: B sequences, X channels of the projection's input, E hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_NAMES = ("out_proj", "o_proj")
"""What mixers call it."""


class OutputProjection(nn.Linear):
    """A linear layer that can be given the tensor for its output.

    Args:
        linear: the layer whose parameters it takes over, as they are.
    """

    def __init__(self, linear: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self._place: Tensor | None = None

    @contextmanager
    def writing_to(self, place_BE: Tensor) -> Iterator[None]:
        """Within, what the layer gives is written to `place_BE`, [B, E], and that is what it returns."""
        self._place = place_BE
        try:
            yield
        finally:
            self._place = None

    def forward(self, x: Tensor) -> Tensor:
        """The projection of x, [..., X] to [..., E]; of a matrix, where there is a place for it."""
        if self._place is None:
            return super().forward(x)
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=self._place)
        return torch.addmm(self.bias, x, self.weight.t(), out=self._place)


def take_output_projection(mixer: nn.Module) -> OutputProjection:
    """Put an `OutputProjection` in the place of a mixer's last projection; names and parameters stay as they are.

    Raises:
        ValueError: the mixer has no projection of that kind.
    """
    for name in _NAMES:
        linear = getattr(mixer, name, None)
        if isinstance(linear, nn.Linear):
            projection = OutputProjection(linear)
            setattr(mixer, name, projection)
            return projection
    raise ValueError(f"{type(mixer).__name__}: it has no projection named {' or '.join(_NAMES)} to write its output")

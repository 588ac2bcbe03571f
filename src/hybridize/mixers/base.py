"""What every mixer obeys.

Legend: B batch, L length, E hidden size, D channels, N states per channel, K convolution taps.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class MixerState(NamedTuple):
    """What a mixer remembers of a sequence, of constant size.

    Attributes:
        conv: the last K inputs of the convolution, [B, D, K], oldest first, zero where there were none.
        ssm: the recurrence's state, fp32: [B, D, N], or with heads [B, H, P, N] (Mamba-2) or [B, H, K, V] (delta rule).
    """

    conv: Tensor
    ssm: Tensor


class Mixer(nn.Module, ABC):
    """A causal map along the sequence with a state of constant size."""

    @abstractmethod
    def __init__(self, spec: Any, hidden_size: int, *, initializer_range: float = 0.02) -> None:
        """Allocate and initialise the parameters."""
        super().__init__()

    @abstractmethod
    def forward(
        self,
        hidden_BLE: Tensor,
        *,
        starts_BL: Tensor | None = None,
        valid_BL: Tensor | None = None,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, MixerState | None]:
        """Mix along L.

        Args:
            hidden_BLE: inputs, [B, L, E].
            starts_BL: bool, True at the first token of each packed document; nothing, `state` included,
                passes from before such a token to it or after it. None: one document per row.
            valid_BL: bool, False where a token is padding: such a token adds nothing to any state or output.
            state: the state to go on from; None: the beginning. With L = 1 this is a decode step.
            return_state: whether to return the state after the last token.

        Returns:
            Outputs [B, L, E] (meaningless at padding), and the new state or None; `state` is left as it is. A mixer
            that remembers nothing never returns a state.
        """

    @abstractmethod
    def state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the state, by its name in `MixerState`; {} for a mixer without one."""

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter, from the generator or else from torch's global seed."""

    def state_bytes(self, dtype: torch.dtype, batch_size: int = 1) -> int:
        """Return the bytes of a state: convolution inputs in `dtype`, the recurrence in fp32."""
        itemsizes = {"conv": dtype.itemsize, "ssm": torch.float32.itemsize}
        shapes = self.state_shapes(batch_size)
        return sum(torch.Size(shape).numel() * itemsizes[name] for name, shape in shapes.items())

"""Nothing in attention's place: the layer adds zero to the residual stream, so that only its MLP is left.

Without parameters and without a state: what leaving a layer out means where layers are ranked (leave one out,
arXiv 2511.02651), as a mixer like any other.

Legend: B batch, L length, E hidden size.
"""

import torch
from torch import Tensor

from hybridize.mixers.base import Mixer, MixerState
from hybridize.spec.mixers import IdentitySpec


class IdentityMixer(Mixer):
    """The residual stream stays as it is: outputs are zero.

    Args:
        spec: the spec.
        hidden_size: E; any.
        initializer_range: nothing is initialised.
    """

    def __init__(self, spec: IdentitySpec, hidden_size: int, *, initializer_range: float = 0.02) -> None:
        super().__init__(spec, hidden_size, initializer_range=initializer_range)
        self.spec = spec

    def forward(
        self,
        hidden_BLE: Tensor,
        *,
        starts_BL: Tensor | None = None,
        valid_BL: Tensor | None = None,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, None]:
        """Return zeros of the input's shape, and no state.

        They depend on the input, with a gradient of 0: what made it is trained by nobody, but data-parallel training
        waits for a gradient of each parameter.
        """
        everywhere = torch.ones((), dtype=torch.bool, device=hidden_BLE.device)
        return hidden_BLE.masked_fill(everywhere, 0.0), None

    def step_in_place(
        self,
        hidden_BE: Tensor,
        conv_MDW: Tensor,
        ssm_M: Tensor,
        slot_B: Tensor | None = None,
        null_slot: int | None = None,
    ) -> Tensor:
        """Return zeros of the input's shape; the pools are of no use."""
        return torch.zeros_like(hidden_BE)

    def state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Return {}: there is no state."""
        return {}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Do nothing: there are no parameters."""

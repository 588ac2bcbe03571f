"""What every mixer obeys.

Legend: B batch, L length, E hidden size, D channels, N states per channel, T convolution taps; with heads: H heads, P
channels of a head, K and V width of a head's keys and values; M slots of a pool, W inputs of a pooled window.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridize.ops.slots import check_pool

NO_STEP = -1e4
"""A padded token's step size before softplus, far enough under zero to give exactly 0 in every dtype."""


class MixerState(NamedTuple):
    """What a mixer remembers of a sequence, of constant size.

    Attributes:
        conv: the last T inputs of the convolution, [B, D, T], oldest first, zero where there were none.
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
    def step_in_place(
        self,
        hidden_BE: Tensor,
        conv_MDW: Tensor,
        ssm_M: Tensor,
        slot_B: Tensor | None = None,
        null_slot: int | None = None,
    ) -> Tensor:
        """Mix one token of each of many sequences, whose states lie in pools and are updated there; no gradients.

        Nothing waits for a GPU, and shapes depend on no data: steps can be captured in a CUDA graph.

        Args:
            hidden_BE: inputs, [B, E].
            conv_MDW: `conv` of many states, [M, D, W]; W may be T, or T - 1, since the oldest of T inputs is out of
                reach of what comes next. Slots may lie further apart than they are long.
            ssm_M: `ssm` of many states, [M, ...], in any float dtype; computed with in fp32 at least.
            slot_B: where each sequence has its state, int32 or int64; None: sequence b in slot b.
            null_slot: the slot of rows that stand for no sequence. It is not touched.

        Returns:
            Outputs [B, E], meaningless for rows that stand for no sequence.

        Raises:
            ValueError: a shape or a dtype does not fit; names the argument, its value and the remedy.
        """

    def pack_projections(self) -> None:
        """Let `step_in_place` make the projections of its input in one product, where there are several.

        For a model that only answers: the parameters become parts of one matrix. They keep their names and can be
        loaded, saved and changed in place. But a pickle of any of them holds the whole matrix; and where they are moved
        or cast, or the mixer is copied, each gets memory of its own and the matrix is kept beside them, unused, until
        this is called again.

        Raises:
            ValueError: the projections' dtypes differ; names both.
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


def check_inputs(
    mixer: Mixer,
    hidden_size: int,
    hidden_BLE: Tensor,
    starts_BL: Tensor | None,
    valid_BL: Tensor | None,
    state: MixerState | None,
) -> None:
    """Check what a mixer's forward is given.

    Raises:
        ValueError: a shape or a dtype does not fit; names the argument, its value and the remedy.
    """
    if hidden_BLE.ndim != 3 or hidden_BLE.shape[-1] != hidden_size:
        raise ValueError(f"hidden_BLE: shape {tuple(hidden_BLE.shape)}; pass [batch, length, {hidden_size}]")
    leading = tuple(hidden_BLE.shape[:2])
    for name, mask in (("starts_BL", starts_BL), ("valid_BL", valid_BL)):
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != leading):
            got = f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise ValueError(f"{name}: {got}; pass a bool tensor of shape {list(leading)}")
    if state is not None:
        for name, shape in mixer.state_shapes(leading[0]).items():
            got_shape = tuple(getattr(state, name).shape)
            if got_shape != shape:
                raise ValueError(f"state.{name}: shape {got_shape}; pass {list(shape)}")


def check_step_inputs(
    mixer: Mixer, hidden_size: int, hidden_BE: Tensor, ssm_M: Tensor, slot_B: Tensor | None, null_slot: int | None
) -> None:
    """Check the inputs of a step in place, before the convolution changes its pool, which it checks itself.

    Raises:
        ValueError: a shape or a dtype does not fit; names it and the remedy.
    """
    if hidden_BE.ndim != 2 or hidden_BE.shape[-1] != hidden_size:
        raise ValueError(f"hidden_BE: shape {tuple(hidden_BE.shape)}; pass [batch, {hidden_size}]")
    check_pool("ssm_M", ssm_M, mixer.state_shapes(1)["ssm"][1:], slot_B, hidden_BE.shape[0], null_slot)


def draw_step_bias(
    like: Tensor, dt_min: float, dt_max: float, floor: float, generator: torch.Generator | None
) -> Tensor:
    """What softplus takes to step sizes that are log-uniform in a range (arXiv 2312.00752).

    Args:
        like: of the shape and on the device wanted.
        dt_min: smallest step size.
        dt_max: largest step size.
        floor: step sizes are clamped to at least this.
        generator: source of randomness; None: torch's global seed.

    Returns:
        fp32.
    """
    log_step = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    log_step.uniform_(math.log(dt_min), math.log(dt_max), generator=generator)
    step = log_step.exp().clamp(min=floor)
    # softplus(bias) = step, written so that neither a small nor a large step loses digits.
    return step + torch.log(-torch.expm1(-step))

"""What the kernel bench measures: an op at a shape, ready to run."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_TOKENS_PER_SEQUENCE = 128
"""Of a shape's tokens, for each sequence of a decode step."""


@dataclass(frozen=True)
class KernelShape:
    """Sizes of a measurement; by default those of the published model's mixer.

    Attributes:
        batch: sequences.
        length: tokens of each.
        channels: of the scan; also the width of all query heads.
        states: of each channel.
        heads: of the scan.
        groups: of its heads; also, times `states`, the width of all key heads.
        taps: of the convolution.
        head_dim: width of a head of attention, and of the other mixers.
    """

    batch: int = 1
    length: int = 16384
    channels: int = 4096
    states: int = 16
    heads: int = 256
    groups: int = 64
    taps: int = 4
    head_dim: int = 128

    @property
    def attention_heads(self) -> int:
        """Query heads."""
        return self.channels // self.head_dim

    @property
    def attention_groups(self) -> int:
        """Key/value heads."""
        return self.groups * self.states // self.head_dim

    def one_token(self) -> "KernelShape":
        """One token each of as many sequences as make up a 128th of this shape's tokens, at least one."""
        num_sequences = max(1, self.batch * self.length // _TOKENS_PER_SEQUENCE)
        return replace(self, batch=num_sequences, length=1)


@dataclass(frozen=True)
class Case:
    """One op's backend, ready to run.

    Attributes:
        run: computes the output from the inputs.
        inputs: all that have gradients; `run` takes them in this order.
        read_bytes: of tensors that a forward must read.
        written_bytes: of tensors that it must write.
        exponentials: how many a forward cannot do without.
        has_backward: whether a backward is measured as well.
    """

    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    read_bytes: int
    written_bytes: int
    exponentials: int
    has_backward: bool = True


Builder = Callable[[KernelShape, torch.device, torch.dtype, torch.Generator], Case | None]
"""Makes a case; None where the machine lacks what it needs."""


def num_bytes(*tensors: Tensor) -> int:
    """Bytes of tensors together."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

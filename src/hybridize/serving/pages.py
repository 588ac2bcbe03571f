"""How a mixer's state lies in a page of vLLM's cache: as bytes, the recurrence's state first, then the convolution's.

All mixers of a model share one page size, that of the largest state, and vLLM is told of nothing but bytes. So layers
with mixers of different kinds look alike to it and go into the same groups of its cache; a group more costs its
scheduling and its metadata once more at every step. Imports no vllm.

Legend: X channels of the convolution, K its taps; P pages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

# Pages are whole multiples of this many bytes, so that every dtype and vector load finds its alignment.
_ALIGNMENT = 64


@dataclass(frozen=True)
class StatePage:
    """The place of one mixer's state in a page.

    Attributes:
        ssm_shape: of the recurrence's state of one sequence.
        ssm_dtype: in which it is kept.
        conv_shape: [X, K - 1]: the convolution's last inputs. The K-th lives on in what has been read from it.
        conv_dtype: in which they are kept.
    """

    ssm_shape: tuple[int, ...]
    ssm_dtype: torch.dtype
    conv_shape: tuple[int, int]
    conv_dtype: torch.dtype

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], ssm_dtype: torch.dtype, conv_dtype: torch.dtype) -> "StatePage":
        """Make it of what `Mixer.state_shapes(1)` says."""
        _, channels, taps = shapes["conv"]
        return cls(tuple(shapes["ssm"][1:]), ssm_dtype, (channels, taps - 1), conv_dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the page that are used, rounded up to the alignment."""
        return _aligned(self._conv_start + prod(self.conv_shape) * self.conv_dtype.itemsize)

    @property
    def _conv_start(self) -> int:
        return _aligned(prod(self.ssm_shape) * self.ssm_dtype.itemsize)

    def views(self, pages_PB: Tensor) -> tuple[Tensor, Tensor]:
        """The states in a pool of pages, as views that can be written through.

        Args:
            pages_PB: [P, bytes], uint8; its rows may lie further apart than they are long.

        Returns:
            The convolution's inputs [P, X, K - 1] and the recurrence's states [P, ...].
        """
        ssm = _view(pages_PB, 0, self.ssm_shape, self.ssm_dtype)
        return _view(pages_PB, self._conv_start, self.conv_shape, self.conv_dtype), ssm


def with_oldest(conv_SXk: Tensor) -> Tensor:
    """A convolution's window as mixers expect it, [S, X, K], of the K - 1 inputs that are kept.

    The oldest input of a window is out of reach for whatever comes next, so it may be anything, and is 0.
    """
    return nn.functional.pad(conv_SXk, (1, 0))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _view(pages_PB: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    part = pages_PB[:, start : start + prod(shape) * dtype.itemsize]
    return part.view(dtype).view(-1, *shape)

"""Launching kernels where the tensors are, and as they need them: Triton itself launches on the current GPU."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

HAS_TRITON = find_spec("triton") is not None


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function with the GPU of its first argument, a tensor, as the current one; on a CPU, as it is."""

    @functools.wraps(function)
    def launch(*args: P.args, **options: P.kwargs) -> T:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.cuda.device_of(first):
            return function(*args, **options)

    return launch


def takes_kernel(tensor: Tensor) -> bool:
    """Whether a tensor is one for our kernels: on a GPU, with Triton installed, and not in fp64."""
    return HAS_TRITON and tensor.is_cuda and tensor.dtype != torch.float64


def contiguous_rows(tensor: Tensor) -> Tensor:
    """Make all axes but the first contiguous."""
    return tensor if tensor[:1].is_contiguous() else tensor.contiguous()


def is_learning(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted of what is computed from these tensors; our kernels for steps have none."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

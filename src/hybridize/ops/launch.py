"""Launching kernels where the tensors are: Triton itself launches on the current GPU, whatever it is."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function with the GPU of its first argument, a tensor, as the current one; on a CPU, as it is."""

    @functools.wraps(function)
    def launch(*args: P.args, **options: P.kwargs) -> T:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.cuda.device_of(first):
            return function(*args, **options)

    return launch

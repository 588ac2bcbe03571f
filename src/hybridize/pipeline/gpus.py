"""Deals out a machine's GPUs among processes that share it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "CUDA_VISIBLE_DEVICES"


def gpu_names() -> tuple[str, ...]:
    """What the environment variable calls each GPU that this process may use; empty without any."""
    import torch

    count = torch.cuda.device_count()  # asks the driver's library, without starting CUDA
    seen = os.environ.get(VARIABLE)
    names = [name.strip() for name in seen.split(",")] if seen else [str(number) for number in range(count)]
    return tuple(names[:count])


@contextmanager
def seeing(gpu: str | None) -> Iterator[None]:
    """Let processes that are started within see one GPU only; with None, what this process sees."""
    if gpu is None:
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = gpu
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before

"""Deals out a machine's GPUs among processes that share it."""

import os


def take_gpu(turn: int) -> str | None:
    """Let this process see one GPU only: the processes take turns. To be called before anything uses CUDA.

    Args:
        turn: the process's number, from 0 on.

    Returns:
        What CUDA_VISIBLE_DEVICES now says; None if there are not two to choose from, and nothing was changed.
    """
    import torch

    count = torch.cuda.device_count()  # asks the driver's library, without starting CUDA
    if count < 2:
        return None
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(count)]
    chosen = names[turn % count].strip()
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen
    return chosen

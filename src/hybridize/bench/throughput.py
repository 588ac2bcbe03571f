"""Tokens per second when generating with transformers, for teachers and hybrids alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from hybridize.models import cache_bytes, sequence_bytes


def measure_throughput(
    model: Any,
    *,
    batch_size: int = 32,
    prompt_tokens: int = 16,
    new_tokens: int = 1024,
    repeats: int = 3,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure how fast a model generates, greedily, from random prompts.

    Every sequence gets exactly `new_tokens`: an end-of-sequence token does not end it. The time is that of the whole
    call of `generate`, reading the prompts included. One run that does not count comes first, so that compiling,
    allocating and choosing kernels are over.

    Args:
        model: a teacher or a hybrid, on the device to be measured; left in the mode it is in, but run in evaluation
            mode.
        batch_size: sequences generated at a time.
        prompt_tokens: length of each prompt.
        new_tokens: generated for each.
        repeats: measurements.
        seed: of the prompts.
        on_progress: called with (runs done, all runs) after each; the one that does not count is counted here.

    Returns:
        - `tokens_per_second`: new tokens of all sequences per second, the median of the repeats; and
          `tokens_per_second_min`, `tokens_per_second_max`, `tokens_per_second_repeats` (each one's), `seconds_repeats`.
        - `batch_size`, `prompt_tokens`, `new_tokens`, `device`, `dtype`.
        - `kv_bytes_per_token`, `state_bytes_per_sequence`, and `cache_bytes_per_sequence`: both together when the
          sequence is complete (a sliding window bounds the first).

    Raises:
        ValueError: an option is out of range.
        RuntimeError: fewer tokens came than were asked for.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("prompt_tokens", prompt_tokens),
        ("new_tokens", new_tokens),
        ("repeats", repeats),
    ):
        if value < 1:
            raise ValueError(f"{name}: {value} is out of range; use at least 1")
    generator = torch.Generator().manual_seed(seed)
    prompt_BL = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens), generator=generator)
    prompt_BL = prompt_BL.to(model.device)
    was_training, own_settings = model.training, model.generation_config
    model.eval()
    # Without an end-of-sequence token, nothing ends early; nor does what else a model's own settings may say cost time.
    model.generation_config = GenerationConfig()
    seconds = []
    try:
        for run in range(repeats + 1):
            elapsed = _time_generation(model, prompt_BL, new_tokens)
            if run:
                seconds.append(elapsed)
            if on_progress:
                on_progress(run + 1, repeats + 1)
    finally:
        model.generation_config = own_settings
        model.train(was_training)
    rates = [batch_size * new_tokens / elapsed for elapsed in seconds]
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_min": min(rates),
        "tokens_per_second_max": max(rates),
        "tokens_per_second_repeats": rates,
        "seconds_repeats": seconds,
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "device": _device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        **_memory(model, prompt_tokens + new_tokens),
    }


def _time_generation(model: Any, prompt_BL: Tensor, new_tokens: int) -> float:
    """Seconds of one run."""
    _synchronise(prompt_BL.device)
    started = time.perf_counter()
    output = model.generate(
        input_ids=prompt_BL,
        attention_mask=torch.ones_like(prompt_BL),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
    )
    _synchronise(prompt_BL.device)
    elapsed = time.perf_counter() - started
    expected = (prompt_BL.shape[0], prompt_BL.shape[1] + new_tokens)
    if tuple(output.shape) != expected:
        raise RuntimeError(f"generate returned {list(output.shape)} tokens instead of {list(expected)}")
    return elapsed


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _memory(model: Any, length: int) -> dict[str, int]:
    """Bytes of a sequence's cache."""
    kv_per_token, state = cache_bytes(model.config, model.dtype)
    return {
        "kv_bytes_per_token": kv_per_token,
        "state_bytes_per_sequence": state,
        "cache_bytes_per_sequence": sequence_bytes(model.config, model.dtype, length),
    }

"""Time, memory and error of the distillation loss beside other implementations and the floor of its matrix products.

Shapes: T tokens, V vocabulary, W words whose gradients are checked, E the width of both models.
"""

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridize.losses import Kind, dense_divergence, linear_divergence

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Student's hidden states and head, teacher's hidden states and head -> mean divergence."""

_LOGIT_SPREAD = 3.0  # standard deviation of the logits
_DISTANCE = 0.15  # of the teacher, relative; about 0.2 nat
_CHECKED_WORDS = 1024
_EXACT_CHUNK_TOKENS = 512
_FLOOR_TOKENS = 4096
_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def measure_loss(
    *,
    num_tokens: int = 16_384,
    width: int = 5120,
    vocabulary: int = 131_072,
    kinds: Sequence[Kind] = ("reverse_kl",),
    dtype: torch.dtype = torch.bfloat16,
    device: str | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure the loss with the gradients on the student's hidden states and head, and whoever else computes it.

    The default shape takes well under a minute on a data-centre GPU, which has units for float64.

    Args:
        num_tokens: T.
        width: E.
        vocabulary: V.
        kinds: which divergences; `jsd` at beta 0.5.
        dtype: of hidden states and heads.
        device: `cuda` if there is one, by default.
        repeats: measurements, whose median counts; one that does not count comes first.
        seed: of the random inputs: logits of standard deviation 3, some 0.2 nat apart.

    Returns:
        One record per kind and implementation, with `op`, `kind`, `backend`, the shape, `dtype`, `device`, and

        - `forward_ms` without gradients, `forward_backward_ms` with;
        - `peak_mib`: the most memory held beyond the inputs, the two gradients included; `beyond_gradients_mib`:
          without them. None on a CPU;
        - `floor_ms`: the time of the four matrix products at the speed of one, measured alone;
        - `value_error`, `hidden_error`, `head_error`: relative to float64, the gradients' in the norm; that of the head
          on the first 1024 words.

        or, if an implementation is not installed or does not fit, its `skipped`: why.

    Raises:
        ValueError: a size is below 1.
    """
    for name, size in (
        ("num_tokens", num_tokens), ("width", width), ("vocabulary", vocabulary), ("repeats", repeats),
    ):  # fmt: skip
        if size < 1:
            raise ValueError(f"{name}: {size} is out of range; use at least 1")
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    inputs = _draw(num_tokens, width, vocabulary, dtype, on, seed)
    rows = min(num_tokens, _FLOOR_TOKENS)
    product = _milliseconds(lambda: inputs[0][:rows] @ inputs[1].t(), repeats, on)
    shared = {
        "op": "distillation_loss",
        "num_tokens": num_tokens,
        "width": width,
        "vocabulary": vocabulary,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else on.type,
        "floor_ms": 4 * product * num_tokens / rows,
    }
    records = []
    for kind in kinds:
        truth = _exact(inputs, kind)
        for backend, find in _BACKENDS.items():
            record: dict[str, Any] = {**shared, "kind": kind, "backend": backend}
            try:
                record |= _measure(find(kind), inputs, truth, repeats)
            except ImportError as error:
                record["skipped"] = f"not installed: {error}"
            except torch.OutOfMemoryError:
                record["skipped"] = "out of memory"
            except (RuntimeError, ValueError) as error:
                record["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            records.append(record)
            gc.collect()
            if on.type == "cuda":
                torch.cuda.empty_cache()
    return records


def loss_table(records: Sequence[dict[str, Any]]) -> str:
    """The records of `measure_loss` as a Markdown table."""
    lines = [
        "| kind | backend | forward, ms | with gradients, ms | of the floor | peak, GiB | beyond gradients, GiB "
        "| error: value | hidden | head |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if "skipped" in record:
            lines.append(f"| {record['kind']} | {record['backend']} | {record['skipped']} |" + " |" * 7)
            continue
        memory = ["-" if record[key] is None else f"{record[key] / 1024:.2f}" for key in _MEMORY_KEYS]
        times = f"{record['forward_ms']:.1f} | {record['forward_backward_ms']:.1f}"
        over = f"{record['forward_backward_ms'] / record['floor_ms']:.2f}x"
        found = " | ".join(f"{record[f'{name}_error']:.1e}" for name in ("value", "hidden", "head"))
        lines.append(f"| {record['kind']} | {record['backend']} | {times} | {over} | {' | '.join(memory)} | {found} |")
    return "\n".join(lines) + "\n"


_MEMORY_KEYS = ("peak_mib", "beyond_gradients_mib")


def _hybridize(kind: Kind) -> Loss:
    return lambda hidden, head, *teacher: linear_divergence(hidden, head, *teacher, kind=kind)


def _dense(kind: Kind) -> Loss:
    return lambda hidden, head, teacher_hidden, teacher_head: dense_divergence(
        hidden @ head.t(), teacher_hidden @ teacher_head.t(), kind
    )


def _trl(kind: Kind) -> Loss:
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    return lambda hidden, head, teacher_hidden, teacher_head: function.apply(
        hidden, head, None, teacher_hidden, teacher_head, None, _BETAS[kind]
    )[0].mean()


def _liger(kind: Kind, accum_dtype: torch.dtype | None = None) -> Loss:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
    loss = module.LigerFusedLinearJSD(jsd_beta=_BETAS[kind], accum_dtype=accum_dtype)
    return lambda hidden, *rest: loss(hidden, *rest, torch.zeros(len(hidden), dtype=torch.long, device=hidden.device))


_BACKENDS: dict[str, Callable[[Kind], Loss]] = {
    "hybridize": _hybridize,
    "trl": _trl,
    "liger": _liger,
    "liger, float32 sums": lambda kind: _liger(kind, torch.float32),
    "dense": _dense,
}


def _draw(
    num_tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    scale = _LOGIT_SPREAD / width**0.5
    hidden, head = normal(num_tokens, width), normal(vocabulary, width) * scale
    teacher_hidden = hidden + _DISTANCE * normal(num_tokens, width)
    teacher_head = head + _DISTANCE * scale * normal(vocabulary, width)
    return hidden.to(dtype), head.to(dtype), teacher_hidden.to(dtype), teacher_head.to(dtype)


def _exact(inputs: Sequence[Tensor], kind: Kind) -> tuple[float, Tensor, Tensor]:
    """The mean and its gradients on the hidden states and on some words of the head, in float64 from `dense`."""
    hidden_TE, head_VE, teacher_hidden_TE, teacher_head_VE = inputs
    total, grad_hidden_TE = 0.0, torch.empty_like(hidden_TE, dtype=torch.float64)
    head, teacher_head = head_VE.double(), teacher_head_VE.double()
    grad_head_WE = torch.zeros_like(head[:_CHECKED_WORDS])
    for start in range(0, len(hidden_TE), _EXACT_CHUNK_TOKENS):
        rows = slice(start, start + _EXACT_CHUNK_TOKENS)
        hidden = hidden_TE[rows].double()
        logits = (hidden @ head.t()).requires_grad_()
        value = dense_divergence(logits, teacher_hidden_TE[rows].double() @ teacher_head.t(), kind, reduction="sum")
        (slope,) = torch.autograd.grad(value / len(hidden_TE), logits)
        total += value.item() / len(hidden_TE)
        grad_hidden_TE[rows] = slope @ head
        grad_head_WE += slope[:, :_CHECKED_WORDS].t() @ hidden
    return total, grad_hidden_TE, grad_head_WE


def _measure(
    loss: Loss, inputs: Sequence[Tensor], truth: tuple[float, Tensor, Tensor], repeats: int
) -> dict[str, float | None]:
    device = inputs[0].device
    hidden, head = (tensor.detach().requires_grad_() for tensor in inputs[:2])

    def step() -> Tensor:
        hidden.grad = head.grad = None
        value = loss(hidden, head, *inputs[2:])
        value.backward()
        return value.detach()

    def without_gradients() -> None:
        with torch.no_grad():
            loss(inputs[0], inputs[1], *inputs[2:])

    value = step().item()  # what is allocated and compiled once is not measured
    assert hidden.grad is not None
    assert head.grad is not None
    exact_value, exact_hidden, exact_head = truth
    found: dict[str, float | None] = {
        "value_error": abs(value - exact_value) / exact_value,
        "hidden_error": _relative_error(hidden.grad, exact_hidden),
        "head_error": _relative_error(head.grad[:_CHECKED_WORDS], exact_head),
        "peak_mib": None,
        "beyond_gradients_mib": None,
    }
    hidden.grad = head.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak = torch.cuda.max_memory_allocated(device) - before
        found["peak_mib"] = peak / 2**20
        found["beyond_gradients_mib"] = (peak - hidden.nbytes - head.nbytes) / 2**20
    found["forward_backward_ms"] = _milliseconds(step, repeats, device)
    found["forward_ms"] = _milliseconds(without_gradients, repeats, device)
    return found


def _relative_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def _milliseconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of a call, one first that does not count."""
    call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)

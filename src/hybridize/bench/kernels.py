"""How fast the recurrences' kernels are, beside their rivals and beside what the hardware allows.

A case is an op at a shape; it is run by each backend that the machine has, a rival's too where it is installed. Its
floor is the larger of two times: the bytes that must cross the memory bus (every input read once, every output
written once) over the bandwidth that a large copy reaches here, and the exponentials over the rate of the units that
make them.

Legend: B batch, L length, D channels, N states per channel, H heads, G groups of heads, K taps.
"""

import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hybridize.bench.cases import Builder, Case, KernelShape, num_bytes
from hybridize.bench.linear import LINEAR_OPS
from hybridize.ops import causal_conv as conv_door
from hybridize.ops import selective_scan as scan_door
from hybridize.ops.causal_conv import causal_conv
from hybridize.ops.selective_scan import selective_scan, selective_scan_step

# Exponentials a multiprocessor makes per clock (NVIDIA, compute capabilities 7.0 to 9.0).
_EXPONENTIALS_PER_CLOCK = 16


DEFAULT_SHAPES: tuple[KernelShape, ...] = (KernelShape(), KernelShape(batch=8, length=2048))


def measure_kernels(
    *,
    ops: Iterable[str] | None = None,
    shapes: Iterable[KernelShape] = DEFAULT_SHAPES,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 30,
    seed: int = 0,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure every backend of the ops at the shapes, in one process, on random inputs.

    Args:
        ops: names from `KERNEL_OPS`; None: all of them.
        shapes: where to measure; an op that takes one token at a time uses `batch * length / 128` sequences, at least
            one, and is measured once for each such number.
        device: None: the GPU if there is one, else the CPU.
        dtype: of the inputs that may be in low precision.
        repeats: runs of which the median counts, after some that do not.
        seed: of the inputs.
        on_progress: called with each record as it is made.

    Returns:
        One record per op, shape and backend: `op`, `backend`, `shape` (text), `device`, `dtype`, `forward_ms`,
        `forward_backward_ms` (None: no backward), `peak_mib` (memory taken on top of the inputs by a forward and
        backward, or a forward alone; None on a CPU), `floor_ms` and `floor_backward_ms` (of a forward; of both; None on
        a CPU), and `copy_gb_per_s`.

    Raises:
        ValueError: an op is unknown or `repeats` is not positive; names it and the remedy.
    """
    names = list(KERNEL_OPS) if ops is None else list(ops)
    for name in names:
        if name not in KERNEL_OPS:
            raise ValueError(f"ops: {name!r} is unknown; use some of {', '.join(KERNEL_OPS)}")
    if repeats < 1:
        raise ValueError(f"repeats: {repeats} is out of range; use at least 1")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bandwidth = _copy_bandwidth(place, repeats)
    exponential_rate = _exponential_rate(place)
    records = []
    for name in names:
        # Shapes that differ in length alone are the same to a decode step.
        distinct = {shape.one_token() if name.endswith("_step") else shape: shape for shape in shapes}
        for measured, shape in distinct.items():
            for backend, build in KERNEL_OPS[name].items():
                generator = torch.Generator(place).manual_seed(seed)
                case = build(shape, place, dtype, generator)
                if case is None:
                    continue
                record: dict[str, Any] = {"op": name, "backend": backend, "shape": _describe(name, measured)}
                record |= {"dtype": str(dtype).removeprefix("torch."), "device": _device_name(place)}
                record |= _measure(case, place, repeats)
                record |= {"floor_ms": None, "floor_backward_ms": None, "copy_gb_per_s": bandwidth / 1e9}
                if place.type == "cuda":
                    record |= _floors(case, bandwidth, exponential_rate)
                records.append(record)
                if on_progress:
                    on_progress(record)
    return records


def kernels_table(records: Iterable[dict[str, Any]]) -> str:
    """Show the records as a Markdown table."""
    lines = [
        "| op | backend | shape | forward ms | forward + backward ms | peak MiB | floor ms | forward / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        floor, forward = record["floor_ms"], record["forward_ms"]
        cells = [
            record["op"],
            record["backend"],
            record["shape"],
            f"{forward:.3f}",
            _show(record["forward_backward_ms"], ".3f"),
            _show(record["peak_mib"], ".0f"),
            _show(floor, ".3f"),
            _show(forward / floor if floor else None, ".2f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _describe(op: str, shape: KernelShape) -> str:
    if op in LINEAR_OPS:
        heads = f"{shape.attention_heads} heads in {shape.attention_groups} groups"
        return f"{shape.batch} x {shape.length}, {heads}, width {shape.head_dim}"
    return f"{shape.batch} x {shape.length}, D {shape.channels}, N {shape.states}, H {shape.heads}, G {shape.groups}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def median_ms(function: Callable[[int], object], device: torch.device, repeats: int) -> float:
    """Median time of a call; the argument counts the calls.

    On a GPU a large buffer is overwritten before each call, which empties the cache, and gives the host time to send
    the call: what counts is the time on the GPU.
    """
    for warm_up in range(3):
        function(warm_up)
    if device.type != "cuda":
        times = []
        for index in range(repeats):
            begin = time.perf_counter()
            function(index)
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)
    with torch.cuda.device(device):
        buffer = torch.empty(2**28, dtype=torch.int32, device=device)
        events = []
        for index in range(repeats):
            buffer.zero_()
            begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin_event.record()
            function(index)
            end_event.record()
            events.append((begin_event, end_event))
        torch.cuda.synchronize(device)
    return statistics.median(begin_event.elapsed_time(end_event) for begin_event, end_event in events)


def _copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second of a copy much larger than the cache, read and written ones counted."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * median_ms(lambda _: target.copy_(source), device, min(repeats, 10)))


def _exponential_rate(device: torch.device) -> float | None:
    """Exponentials per second at the top clock; None where it is not known."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "clock_rate", None)
    if not clock_khz:
        return None
    return _EXPONENTIALS_PER_CLOCK * properties.multi_processor_count * clock_khz * 1e3


def _floors(case: Case, bandwidth: float, exponential_rate: float | None) -> dict[str, float | None]:
    rate = exponential_rate or math.inf
    forward = max((case.read_bytes + case.written_bytes) / bandwidth, case.exponentials / rate)
    # A backward reads what the forward read and the output's gradient, and writes each input's gradient.
    both_bytes = 3 * case.read_bytes + 2 * case.written_bytes
    both = max(both_bytes / bandwidth, 2 * case.exponentials / rate)
    return {"floor_ms": 1e3 * forward, "floor_backward_ms": 1e3 * both if case.has_backward else None}


def _measure(case: Case, device: torch.device, repeats: int) -> dict[str, float | None]:
    def forward(_: int) -> Tensor:
        with torch.no_grad():
            return case.run(*case.inputs)

    grad_out = torch.randn_like(forward(0))
    learned = tuple(t.detach().requires_grad_() for t in case.inputs)

    def forward_backward(_: int) -> None:
        torch.autograd.grad(case.run(*learned), learned, grad_out)

    whole = forward_backward if case.has_backward else forward
    times = {"forward_ms": median_ms(forward, device, repeats), "forward_backward_ms": None, "peak_mib": None}
    if case.has_backward:
        times["forward_backward_ms"] = median_ms(forward_backward, device, repeats)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        whole(0)
        torch.cuda.synchronize(device)
        times["peak_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return times


def scan_inputs(
    shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator, length: int
) -> tuple[Tensor, ...]:
    """Return x, dt, A, B, C, D, dt bias and z as a trained mixer has them: decays slow and fast, steps 1e-3 to 0.1."""
    batch, channels, states = shape.batch, shape.channels, shape.states

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, generator=generator)

    step_D = torch.exp(torch.rand(channels, device=device, generator=generator) * 4.6 - 6.9)
    A_DN = -torch.arange(1.0, states + 1, device=device) * torch.exp(0.3 * random(channels, states))
    return (
        random(batch, length, channels).to(dtype),
        (0.5 * random(batch, length, channels)).to(dtype),
        A_DN,
        random(batch, length, shape.groups, states).to(dtype),
        random(batch, length, shape.heads, states).to(dtype),
        torch.ones(channels, device=device),
        step_D + torch.log(-torch.expm1(-step_D)),
        random(batch, length, channels).to(dtype),
    )


def _scan(backend: str) -> Builder:
    def build(shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Case | None:
        # Plain torch is not worth its minutes where there is a kernel.
        if backend != scan_door._BACKEND_OF_DEVICE.get(device.type, "chunked"):
            return None
        inputs = scan_inputs(shape, device, dtype, generator, shape.length)

        def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, z: Tensor) -> Tensor:
            return selective_scan(x, dt, A, B, C, D_D=D, dt_bias_D=bias, z_BLD=z, backend=backend)[0]

        return Case(run, inputs, num_bytes(*inputs), num_bytes(inputs[0]), inputs[0].numel() * shape.states)

    return build


def _channels_first(inputs: tuple[Tensor, ...], shape: KernelShape) -> tuple[Tensor, ...]:
    """A scan's inputs as CUDA kernels take them: channels before tokens, and as many groups of B as of C."""
    x, dt, A, B, C, D, bias, z = inputs
    B = B.repeat_interleave(shape.heads // shape.groups, dim=2)
    x, dt, z = (tensor.transpose(1, 2).contiguous() for tensor in (x, dt, z))
    B, C = (tensor.permute(0, 2, 3, 1).contiguous() for tensor in (B, C))
    return x, dt, A, B, C, D, bias, z


def _rival(module: str, name: str) -> Callable[..., Any] | None:
    """A rival's function, or None where it is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def _scan_mamba_ssm(
    shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Case | None:
    """Mamba's own CUDA kernel."""
    function = _rival("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn") if device.type == "cuda" else None
    if function is None:
        return None
    inputs = _channels_first(scan_inputs(shape, device, dtype, generator, shape.length), shape)

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, z: Tensor) -> Tensor:
        return function(x, dt, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)

    return Case(run, inputs, num_bytes(*inputs), num_bytes(inputs[0]), inputs[0].numel() * shape.states)


def _scan_vllm(shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Case | None:
    """The CUDA kernel of vLLM: forward alone; it writes its outputs over Δ or the gate, and the last states."""
    module = "vllm.model_executor.layers.mamba.ops.mamba_ssm"
    function = _rival(module, "selective_scan_fn") if device.type == "cuda" else None
    if function is None:
        return None
    inputs = _channels_first(scan_inputs(shape, device, dtype, generator, shape.length), shape)
    states = torch.zeros(shape.batch, shape.channels, shape.states, device=device)

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, z: Tensor) -> Tensor:
        return function(x, states, dt, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)

    numel = inputs[0].numel() * shape.states
    return Case(run, inputs, num_bytes(*inputs), num_bytes(inputs[0], states), numel, has_backward=False)


def _step(shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Case | None:
    few = shape.one_token()
    x, dt, A, B, C, D, bias, z = scan_inputs(few, device, dtype, generator, 1)
    state = torch.randn(few.batch, few.channels, few.states, device=device, generator=generator)
    inputs = (state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, bias, z[:, 0])

    def run(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *more: Tensor) -> Tensor:
        D, bias, z = more
        return selective_scan_step(state, x, dt, A, B, C, D_D=D, dt_bias_D=bias, z_BD=z)[0]

    written = num_bytes(state, x)
    return Case(run, inputs, num_bytes(*inputs), written, state.numel(), has_backward=False)


def _conv(backend: str) -> Builder:
    def build(shape: KernelShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Case | None:
        if backend == "triton" and conv_door._BACKEND_OF_DEVICE.get(device.type) != "triton":
            return None
        times = shape.heads // shape.groups
        width = shape.channels // shape.heads

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device, generator=generator).to(dtype)

        x_BLX = random(shape.batch, shape.length, shape.groups * width)
        inputs = (x_BLX, random(shape.channels, shape.taps), random(shape.channels))

        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return causal_conv(x, weight, bias, repeat=(width, times), backend=backend)[0]

        written = times * num_bytes(x_BLX)
        return Case(run, inputs, num_bytes(*inputs), written, times * x_BLX.numel())

    return build


# What is measured: each op's backends and rivals. A builder returns None where the machine lacks what it needs.
KERNEL_OPS: dict[str, dict[str, Builder]] = {
    "selective_scan": {
        "triton": _scan("triton"),
        "mamba-ssm": _scan_mamba_ssm,
        "vllm": _scan_vllm,
        "chunked": _scan("chunked"),
    },
    "selective_scan_step": {"default": _step},
    "causal_conv": {"triton": _conv("triton"), "shifted": _conv("shifted")},
    **LINEAR_OPS,
}

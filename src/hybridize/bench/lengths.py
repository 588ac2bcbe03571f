"""What the selective scan costs per token, against the number of tokens.

On a GPU a CUDA graph is measured, as in serving, so that what the host does before each kernel does not count; at short
lengths that is most of the time otherwise.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hybridize.bench.cases import KernelShape
from hybridize.bench.kernels import median_ms, scan_inputs
from hybridize.ops.selective_scan import selective_scan

LENGTHS = tuple(1024 * 4**power for power in range(5))  # 1k to 256k


def measure_lengths(
    *,
    lengths: Iterable[int] = LENGTHS,
    shape: KernelShape | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure one sequence of each length, forward alone and with gradients of all inputs.

    Args:
        lengths: tokens.
        shape: all other sizes; by default those of the published model's mixer.
        device: None: the GPU if there is one, else the CPU.
        dtype: of the inputs that may be in low precision.
        repeats: runs of which the median counts.
        seed: of the inputs.

    Returns:
        One record per length: `op`, `length`, `device`, `forward_ns_per_token`, `forward_backward_ns_per_token`.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape = shape or KernelShape()
    records = []
    for length in lengths:
        generator = torch.Generator(place).manual_seed(seed)
        x, dt, A, B, C, D, bias, z = scan_inputs(shape, place, dtype, generator, length)
        inputs = tuple(tensor.requires_grad_() for tensor in (x, dt, A, B, C, D, bias, z))
        grad_out = torch.randn_like(x.detach())

        def scan(inputs: tuple[torch.Tensor, ...] = inputs) -> torch.Tensor:
            x, dt, A, B, C, D, bias, z = inputs
            return selective_scan(x, dt, A, B, C, D_D=D, dt_bias_D=bias, z_BLD=z)[0]

        def forward(scan: Callable[[], torch.Tensor] = scan) -> None:
            with torch.no_grad():
                scan()

        def both(
            scan: Callable[[], torch.Tensor] = scan,
            inputs: tuple[torch.Tensor, ...] = inputs,
            grad_out: torch.Tensor = grad_out,
        ) -> None:
            torch.autograd.grad(scan(), inputs, grad_out)

        record: dict[str, Any] = {"op": "selective_scan", "length": length, "device": place.type}
        if place.type == "cuda":
            record["device"] = torch.cuda.get_device_name(place)
        for name, function in (("forward", forward), ("forward_backward", both)):
            run = _captured(function, place)
            record[f"{name}_ns_per_token"] = 1e6 * median_ms(run, place, repeats) / (shape.batch * length)
        records.append(record)
    return records


def _captured(function: Callable[[], None], device: torch.device) -> Callable[[int], object]:
    """On a GPU the function's kernels as a graph, to be called with any number."""
    if device.type != "cuda":
        return lambda _: function()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return lambda _: graph.replay()

"""For the tests of SSD and of the selective scan: documents and pieces in time, and how results are compared."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

LENGTHS = [1, 63, 1000]


def over_time(name: str) -> bool:
    return "L" in name.split("_")[1]


def cut(inputs: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {name: tensor[:, begin:end] if over_time(name) else tensor for name, tensor in inputs.items()}


def random_starts(batch: int, length: int, documents: int) -> Tensor:
    starts_BL = torch.zeros(batch, length, dtype=torch.bool)
    for row in range(batch):
        starts_BL[row, torch.randperm(length)[: documents - 1]] = True
    return starts_BL


def with_gradients(
    outputs: tuple[Tensor, Tensor | None],
    inputs: dict[str, Tensor],
    weights: tuple[Tensor, Tensor],
    materialize_grads: bool = False,
) -> dict[str, Tensor]:
    """Outputs and the gradients of a random linear function of them."""
    y, state = outputs
    assert state is not None
    value = (y * weights[0]).sum() + (state * weights[1]).sum()
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    grads = torch.autograd.grad(value, list(wanted.values()), materialize_grads=materialize_grads)
    return {"y": y, "state": state, **dict(zip(wanted, grads, strict=True))}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each tensor at the scale of its largest entry."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.isfinite(tensor).all(), name
        scale = float(tensor.detach().abs().max()) or 1.0
        error = float((got[name].double() - tensor.double()).detach().abs().max()) / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def document_by_document(
    scan: Callable[..., Any], inputs: dict[str, Tensor], starts_BL: Tensor, state_name: str
) -> tuple[Tensor, Tensor]:
    """One row's documents, each by itself: all outputs, and the last one's state."""
    length = starts_BL.shape[1]
    bounds = [0, *(t for t in starts_BL[0].nonzero().flatten().tolist() if t > 0), length]
    values, states = [], []
    for begin, end in pairwise(bounds):
        document = cut(inputs, begin, end)
        if starts_BL[0, begin]:
            del document[state_name]
        y, state = scan(**document, return_final_state=True)
        values.append(y)
        states.append(state)
    return torch.cat(values, dim=1), states[-1]


def piece_by_piece(
    scan: Callable[..., Any], inputs: dict[str, Tensor], bounds: tuple[int, ...], state_name: str
) -> tuple[Tensor, Tensor]:
    """Pieces in time, each from the state that the one before left: all outputs, and the last state."""
    state, pieces = inputs[state_name], []
    for begin, end in pairwise(bounds):
        y, state = scan(**cut(inputs, begin, end) | {state_name: state}, return_final_state=True)
        pieces.append(y)
    return torch.cat(pieces, dim=1), state


def assert_gradients_are_right(scan: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    """Every input's gradient against finite differences; `starts_BL` has none."""
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}

    def outputs(*tensors: Tensor) -> Any:
        return scan(**inputs | dict(zip(wanted, tensors, strict=True)), return_final_state=True)

    assert torch.autograd.gradcheck(outputs, tuple(wanted.values()), fast_mode=True, nondet_tol=1e-12)


def kept_numel(scan: Callable[..., Any], inputs: dict[str, Tensor]) -> int:
    """How many numbers autograd keeps for the backward pass, the inputs among them."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scan(**inputs)
    return sum(kept.values())


def assert_chunked_is_faster_than_the_loop(scan: Callable[..., Any], inputs: dict[str, Tensor], times: float) -> None:
    """Without gradients; best of several runs each, and of several rounds."""

    def best_seconds(backend: str, runs: int) -> float:
        seconds = []
        for _ in range(runs):
            begin = time.perf_counter()
            scan(**inputs, backend=backend)
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    ratios = []
    with torch.no_grad():
        for _ in range(5):
            fast = best_seconds("chunked", 20)
            ratios.append(best_seconds("reference", 2) / fast)
            if ratios[-1] > times:
                return
    pytest.fail(f"chunked over reference: {ratios}")

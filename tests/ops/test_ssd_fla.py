"""State space duality by flash-linear-attention's kernel: what it is handed, and on a GPU what the backends give."""

import sys
import types
from itertools import pairwise

import pytest
import torch
from recurrence_checks import LENGTHS, assert_same
from ssd_inputs import make_inputs, run, weights_for
from torch import Tensor

from hybridize.ops.fla_package import sequence_bounds
from hybridize.ops.ssd import ssd
from hybridize.ops.ssd.fla import ssd_fla


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What fla's kernel computes, by its documentation, one token after the other."""
    assert output_final_state
    assert all(tensor.is_contiguous() for tensor in (q, k, v, g))
    assert float(g.min()) > -100, "the kernel subtracts sums of these: strong ones cost the others their digits"
    bounds = list(range(0, q.shape[0] * q.shape[1] + 1, q.shape[1])) if cu_seqlens is None else cu_seqlens.tolist()
    if cu_seqlens is not None:
        assert q.shape[0] == 1
        assert initial_state is None or len(initial_state) == len(bounds) - 1
    rows = [tensor.flatten(0, 1) for tensor in (q, k, v, g)]
    outs, states = [], []
    for index, (begin, end) in enumerate(pairwise(bounds)):
        state = torch.zeros(q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state[index]
        for t in range(begin, end):
            q_t, k_t, v_t, g_t = (tensor[t] for tensor in rows)
            state = g_t.exp()[:, None, None] * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
            outs.append(scale * (state * q_t.unsqueeze(-1)).sum(dim=1))
        states.append(state)
    return torch.stack(outs).view(*q.shape[:3], -1), torch.stack(states)


@pytest.fixture
def _fla_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself runs on a GPU only; what it is handed and what is made of it is checked here."""
    module = types.ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = simple_gla  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)


def assert_fla_is_reference(inputs: dict[str, Tensor]) -> None:
    y_BLHP, state_BHPN = ssd_fla(**inputs)
    expected = ssd(**inputs, return_final_state=True, backend="reference")
    assert_same({"y": y_BLHP, "state": state_BHPN}, dict(zip(("y", "state"), expected, strict=True)), 1e-5)


@pytest.mark.usefixtures("_fla_on_a_cpu")
@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("documents", [1, 3, 20])
def test_fla_is_handed_the_same_recurrence(documents: int, initial: bool) -> None:
    inputs = {
        name: tensor.detach() for name, tensor in make_inputs(dtype=torch.float32, documents=documents, batch=3).items()
    }
    if not initial:
        del inputs["initial_state_BHPN"]
    assert_fla_is_reference(inputs)


@pytest.mark.usefixtures("_fla_on_a_cpu")
@pytest.mark.parametrize("documents", [1, 3])
def test_strong_decays_are_tamed_for_fla(documents: int) -> None:
    inputs = {name: t.detach() for name, t in make_inputs(dtype=torch.float32, documents=documents).items()}
    inputs["dt_BLH"] = 300 * inputs["dt_BLH"]
    assert_fla_is_reference(inputs)


def test_bounds_of_documents_are_cut_at_rows_too() -> None:
    starts_BL = torch.tensor([[False, True, False], [True, False, False], [False, False, True]])
    bounds_S1, first_B, last_B = sequence_bounds(starts_BL)
    assert bounds_S1.tolist() == [0, 1, 3, 6, 8, 9]
    assert first_B.tolist() == [0, 2, 3]
    assert last_B.tolist() == [1, 2, 4]


def test_bounds_are_found_once_for_all_layers_and_anew_when_documents_change() -> None:
    starts_BL = torch.zeros(2, 3, dtype=torch.bool)
    bounds = sequence_bounds(starts_BL)
    assert sequence_bounds(starts_BL) is bounds
    assert sequence_bounds(starts_BL.clone()) is not bounds, "another tensor"
    bounds = sequence_bounds(starts_BL)
    starts_BL[1, 2] = True
    assert sequence_bounds(starts_BL)[0].tolist() == [0, 3, 5, 6], "changed in place"
    with torch.inference_mode():
        within = torch.zeros(1, 4, dtype=torch.bool)
        assert sequence_bounds(within)[0].tolist() == [0, 4]
        within[0, 1] = True
        assert sequence_bounds(within)[0].tolist() == [0, 1, 4]
        assert sequence_bounds(starts_BL)[0].is_inference()
    assert not sequence_bounds(starts_BL)[0].is_inference(), "a later training may save them for its gradients"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", [None, "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", LENGTHS)
def test_gpu_equals_the_exact_reference(length: int, dtype: torch.dtype, backend: str | None) -> None:
    inputs = make_inputs(length=length, heads=8, groups=2, width=32, states=64, documents=min(3, length))
    exact = {name: tensor.detach().cuda() for name, tensor in inputs.items()}
    rounded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in exact.items()}
    exact = {name: t.double().requires_grad_() if t.is_floating_point() else t for name, t in rounded.items()}
    rounded = {name: t.clone().requires_grad_() if t.is_floating_point() else t for name, t in rounded.items()}
    weights = tuple(weight.cuda() for weight in weights_for(inputs))
    expected = run(exact, "reference", weights)
    with torch.no_grad():
        y_BLHP, _ = ssd(**rounded, backend=backend)
    got = run(rounded, backend, weights)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    got = {name: tensor.double() for name, tensor in got.items()}
    assert_same(got, expected, tolerance)
    assert_same({"y": y_BLHP.double()}, {"y": expected["y"]}, tolerance)

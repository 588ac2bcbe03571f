"""Steps that update states in a pool against the ops' own steps in fp64: the plain form, and on a GPU the kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from hybridize.ops.causal_conv import causal_conv_step, causal_conv_step_in_place
from hybridize.ops.delta_rule.in_place import delta_rule_step_in_place
from hybridize.ops.gated_delta import gated_delta_rule_step
from hybridize.ops.kimi_delta import kimi_delta_attention_step
from hybridize.ops.selective_scan import selective_scan_step, selective_scan_step_in_place
from hybridize.ops.ssd import ssd_step, ssd_step_in_place

_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _NO_GPU])])
NULL = 1


@dataclass
class Case:
    """A step of one op.

    Attributes:
        row_shape: of a sequence's state.
        tokens: what belongs to a sequence, [B, ...].
        fixed: what all sequences share.
        in_place: takes pool, slots, tokens, fixed and the null slot; gives the output.
        step: takes state, tokens and fixed; gives the output and the new state.
    """

    row_shape: tuple[int, ...]
    tokens: dict[str, Tensor]
    fixed: dict[str, Tensor]
    in_place: Callable[..., Tensor]
    step: Callable[..., tuple[Tensor, Tensor]]


def delta_case(
    batch: int, kimi: bool, unit: bool = True, heads: int = 4, groups: int = 2, keys: int = 12, values: int = 20
) -> Case:
    per_channel = (keys,) if kimi else ()
    tokens = {
        "q": torch.randn(batch, heads, keys),
        "k": torch.randn(batch, groups, keys),
        "v": torch.randn(batch, groups, values),
        "f": torch.randn(batch, heads, *per_channel) * 2,
        "b": torch.randn(batch, heads),
    }
    if not unit:
        tokens["k"] = normalize(tokens["k"], dim=-1)
    fixed = {"A_log": torch.randn(heads), "dt_bias": torch.randn(heads * (keys if kimi else 1))}

    def in_place(pool: Tensor, slots: Tensor | None, q: Tensor, k: Tensor, v: Tensor, f: Tensor, b: Tensor,
                 A_log: Tensor, dt_bias: Tensor, null: int | None) -> Tensor:  # fmt: skip
        return delta_rule_step_in_place(
            pool, slots, q, k, v, f, b, A_log_H=A_log, dt_bias=dt_bias, unit_length=unit, null_slot=null
        )

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, f: Tensor, b: Tensor,
             A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        rate = A_log.exp().view(heads, *[1] * len(per_channel))
        g = -rate * softplus(f + dt_bias.view(heads, *per_channel))
        if unit:
            q, k = (t / (t.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        op = kimi_delta_attention_step if kimi else gated_delta_rule_step
        return op(state, q, k, v, g, b.sigmoid())

    return Case((heads, keys, values), tokens, fixed, in_place, step)


def ssd_case(
    batch: int, heads: int = 4, groups: int = 2, width: int = 20, states: int = 12, bare: bool = False
) -> Case:
    tokens = {
        "x": torch.randn(batch, groups, width),
        "dt": torch.randn(batch, heads) * (0 if bare else 2) + bare,
        "B": torch.randn(batch, groups, states),
        "C": torch.randn(batch, heads, states),
    }
    more = {} if bare else {"D_H": torch.randn(heads), "dt_bias_H": torch.randn(heads)}

    def in_place(pool: Tensor, slots: Tensor | None, x: Tensor, dt: Tensor, B: Tensor, C: Tensor,
                 A_log: Tensor, null: int | None, **more: Tensor) -> Tensor:  # fmt: skip
        return ssd_step_in_place(pool, slots, x, dt, A_log, B, C, dt_softplus=not bare, null_slot=null, **more)

    def step(state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor,
             A_log: Tensor, **more: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        return ssd_step(state, x, dt, -A_log.exp(), B, C, dt_softplus=not bare, **more)

    return Case((heads, width, states), tokens, {"A_log": torch.randn(heads), **more}, in_place, step)


def scan_case(
    batch: int, heads: int = 6, groups: int = 3, width: int = 50, states: int = 5, bare: bool = False
) -> Case:
    channels = heads * width
    tokens = {
        "x": torch.randn(batch, channels),
        "dt": torch.randn(batch, channels) * (0 if bare else 2) + bare,
        "B": torch.randn(batch, groups, states),
        "C": torch.randn(batch, heads, states),
    }
    more = {} if bare else {"D_D": torch.randn(channels), "dt_bias_D": torch.randn(channels)}
    if not bare:
        tokens["z"] = torch.randn(batch, channels)

    def in_place(pool: Tensor, slots: Tensor | None, x: Tensor, dt: Tensor, B: Tensor, C: Tensor,
                 A_log: Tensor, null: int | None, z: Tensor | None = None, **more: Tensor) -> Tensor:  # fmt: skip
        return selective_scan_step_in_place(
            pool, slots, x, dt, A_log, B, C, z_BD=z, dt_softplus=not bare, null_slot=null, **more
        )

    def step(state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor,
             A_log: Tensor, z: Tensor | None = None, **more: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        return selective_scan_step(state, x, dt, -A_log.exp(), B, C, z_BD=z, dt_softplus=not bare, **more)

    return Case((channels, states), tokens, {"A_log": torch.randn(channels, states), **more}, in_place, step)


def conv_case(
    batch: int, channels: int = 600, taps: int = 4, kept: int = 3, repeat: tuple[int, int] | None = None,
    silu: bool = True, bias: bool = True
) -> Case:  # fmt: skip
    wide = channels * (repeat[1] if repeat else 1)
    fixed = {"weight": torch.randn(wide, taps)} | ({"bias": torch.randn(wide)} if bias else {})
    options: dict[str, Any] = {"activation": "silu" if silu else None, "repeat": repeat}

    def in_place(pool: Tensor, slots: Tensor | None, x: Tensor, weight: Tensor, null: int | None,
                 bias: Tensor | None = None) -> Tensor:  # fmt: skip
        return causal_conv_step_in_place(pool, slots, x, weight, bias, null_slot=null, **options)

    def step(window: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        whole = torch.cat([window.new_full((*window.shape[:2], 1), 7.0), window], dim=-1)[..., -taps:]
        y, new = causal_conv_step(whole, x, weight, bias, **options)
        return y, new[..., -kept:] if kept else new[..., :0]

    return Case((wide, kept), {"x": torch.randn(batch, channels)}, fixed, in_place, step)


CASES: dict[str, Callable[[int], Case]] = {
    "gated": lambda batch: delta_case(batch, kimi=False),
    "gated, wide": lambda batch: delta_case(batch, kimi=False, keys=130, values=70),
    "gated, one group, as they are": lambda batch: delta_case(batch, kimi=False, groups=1, unit=False),
    "kimi": lambda batch: delta_case(batch, kimi=True),
    "kimi, wide": lambda batch: delta_case(batch, kimi=True, heads=3, groups=3, keys=64, values=256),
    "kimi, as they are": lambda batch: delta_case(batch, kimi=True, unit=False),
    "ssd": ssd_case,
    "ssd, wide": lambda batch: ssd_case(batch, width=70, states=130),
    "ssd, one group, bare": lambda batch: ssd_case(batch, groups=1, bare=True),
    "scan": scan_case,
    "scan, one group, bare": lambda batch: scan_case(batch, groups=1, states=16, bare=True),
    "conv": conv_case,
    "conv, repeated": lambda batch: conv_case(batch, channels=60, repeat=(10, 3)),
    "conv, whole window, bare": lambda batch: conv_case(batch, kept=4, silu=False, bias=False),
    "conv, two taps": lambda batch: conv_case(batch, taps=2, kept=1),
    "conv, one tap": lambda batch: conv_case(batch, taps=1, kept=0),
}
every_case = pytest.mark.parametrize("name", list(CASES))


def make_pool(
    num_slots: int, row_shape: tuple[int, ...], gap: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """A pool with gaps between its slots, and the tensor that it is a view of."""
    numel = torch.Size(row_shape).numel()
    whole = torch.randn(num_slots, numel + gap, device=device).to(dtype)
    return whole[:, :numel].view(num_slots, *row_shape), whole


def check(case: Case, slots: list[int], gap: int, dtype: torch.dtype, device: str, index_dtype: torch.dtype) -> None:
    pool, whole = make_pool(3 * len(slots), case.row_shape, gap, dtype, device)
    pool[NULL] = torch.nan
    before = whole.clone()
    tokens, fixed = ({k: t.to(device) for k, t in part.items()} for part in (case.tokens, case.fixed))
    slot_B = torch.tensor(slots, dtype=index_dtype, device=device)
    live = slot_B != NULL
    state = pool.double()[slot_B.long()]
    exact = ({k: t.double() for k, t in part.items()} for part in (tokens, fixed))
    expected, new = case.step(state.cpu(), **{k: t.cpu() for part in exact for k, t in part.items()})
    got = case.in_place(pool, slot_B, **tokens, **fixed, null=NULL)
    assert got.dtype == torch.float32
    assert not got[~live].any()
    torch.testing.assert_close(got[live].cpu().double(), expected[live.cpu()], rtol=2e-5, atol=2e-5)
    close = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 2e-5}
    torch.testing.assert_close(pool[slot_B[live].long()].cpu().double(), new[live.cpu()], **close)
    touched = slot_B[live].long()
    whole[touched, : state[0].numel()] = before[touched, : state[0].numel()]
    assert torch.equal(whole.nan_to_num(99.0), before.nan_to_num(99.0)), "something else was written"


@devices
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("slots", "gap"), [([14, 1, 3, 0, 1], 0), ([5], 16), ([2, 11, 7, 1], 3)])
def test_pool_steps_equal_the_ops_steps(name: str, slots: list[int], gap: int, dtype: torch.dtype, device: str) -> None:
    index_dtype = torch.int32 if gap else torch.int64
    check(CASES[name](len(slots)), [slot % (3 * len(slots)) for slot in slots], gap, dtype, device, index_dtype)


@devices
@every_case
def test_without_slots_each_row_has_its_own(name: str, device: str) -> None:
    case = CASES[name](3)
    pool, _ = make_pool(4, case.row_shape, 8, torch.float32, device)
    tokens, fixed = ({k: t.to(device) for k, t in part.items()} for part in (case.tokens, case.fixed))
    other = pool.clone()
    got = case.in_place(pool, None, **tokens, **fixed, null=None)
    expected = case.in_place(other, torch.arange(3, device=device), **tokens, **fixed, null=None)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pool, other, rtol=1e-6, atol=1e-6)


@devices
@every_case
def test_half_precision_and_views_of_a_projection_are_taken(name: str, device: str) -> None:
    case = CASES[name](3)
    pool, _ = make_pool(4, case.row_shape, 0, torch.float32, device)
    tokens = {k: t.to(device).bfloat16() for k, t in case.tokens.items()}
    fixed = {k: t.to(device) for k, t in case.fixed.items()}
    # As slices of one wide row, which is what a projection gives.
    row = torch.cat([t.flatten(1) for t in tokens.values()], dim=1)
    parts = row.split([t[0].numel() for t in tokens.values()], dim=1)
    views = {k: part.view(t.shape) for (k, t), part in zip(tokens.items(), parts, strict=True)}
    other, slot_B = pool.clone(), torch.tensor([3, 0, 2], device=device)
    got = case.in_place(pool, slot_B, **views, **fixed, null=None)
    expected = case.in_place(other, slot_B, **{k: t.float() for k, t in tokens.items()}, **fixed, null=None)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(pool, other, rtol=3e-2, atol=3e-2)


@every_case
def test_no_rows_are_no_work(name: str) -> None:
    case = CASES[name](0)
    pool, _ = make_pool(2, case.row_shape, 0, torch.float32, "cpu")
    before = pool.clone()
    empty = torch.empty(0, dtype=torch.int32)
    assert len(case.in_place(pool, empty, **case.tokens, **case.fixed, null=0)) == 0
    assert torch.equal(pool, before)


@pytest.mark.parametrize("kimi", [False, True])
def test_no_rows_launch_no_kernel_of_a_delta_rule(kimi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "kimi_delta" if kimi else "gated_delta"
    monkeypatch.setattr(f"hybridize.ops.{module}.takes_kernel", lambda tensor: True)
    case = delta_case(0, kimi=kimi)
    o_BHV, state_BHKV = case.step(torch.zeros(0, *case.row_shape), **case.tokens, **case.fixed)
    assert (o_BHV.shape, state_BHKV.shape) == ((0, 4, 20), (0, 4, 12, 20))


@every_case
def test_a_pool_that_does_not_fit_is_refused(name: str) -> None:
    case = CASES[name](3)
    rest = {**case.tokens, **case.fixed}
    pool, _ = make_pool(4, case.row_shape, 0, torch.float32, "cpu")
    slot_B = torch.tensor([0, 1, 2])
    wrong_shape, _ = make_pool(4, (case.row_shape[0] + 1, *case.row_shape[1:]), 0, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"^pool_M\w+: .*; pass "):
        case.in_place(wrong_shape, slot_B, **rest, null=None)
    with pytest.raises(ValueError, match=r"^slot_B: torch.int16 .*; pass int32 or int64 of shape \[3\]"):
        case.in_place(pool, slot_B.short(), **rest, null=None)
    with pytest.raises(ValueError, match=r"^slot_B: torch.int64 of shape \(2,\); pass"):
        case.in_place(pool, slot_B[:2], **rest, null=None)
    with pytest.raises(ValueError, match=r"^slot_B: None with 2 slots for 3 rows"):
        case.in_place(pool[:2], None, **rest, null=None)
    before = pool.clone()
    with pytest.raises(ValueError, match=r"^slot_B: -1; pass slots of the pool, and null_slot where"):
        case.in_place(pool, torch.tensor([0, -1, 2]), **rest, null=1)
    assert torch.equal(pool, before)
    with pytest.raises(ValueError, match=r"^null_slot: 4; pass one of the pool's slots, 0..3, or None"):
        case.in_place(pool, slot_B, **rest, null=4)
    if case.row_shape[-1] > 1:
        apart, _ = make_pool(4, (*case.row_shape, 2), 0, torch.float32, "cpu")
        with pytest.raises(ValueError, match=r"each slot must be contiguous"):
            case.in_place(apart[..., 0], slot_B, **rest, null=None)


@pytest.mark.gpu
@_NO_GPU
@pytest.mark.parametrize("name", ["gated", "kimi", "ssd", "scan", "conv, whole window, bare"])
def test_the_ops_own_steps_take_the_kernels_on_a_gpu(name: str) -> None:
    case = CASES[name](3)
    state = torch.randn(3, *case.row_shape)
    everything = {**case.tokens, **case.fixed}
    exact = {k: t.double() for k, t in everything.items()}
    expected = case.step(state.double(), **exact)
    on_gpu = {k: t.cuda() for k, t in everything.items()}
    before = state.cuda()
    given = before.clone()
    got = case.step(given, **on_gpu)
    assert torch.equal(given, before)
    for tensor, wanted in zip(got, expected, strict=True):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.cpu().double(), wanted, rtol=2e-5, atol=2e-5)
    learning = {k: t.requires_grad_() for k, t in on_gpu.items()}
    y, _ = case.step(given, **learning)
    torch.testing.assert_close(y.detach(), got[0], rtol=2e-5, atol=2e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(learning.values())))


@pytest.mark.gpu
@_NO_GPU
@every_case
def test_steps_can_be_captured_in_a_graph(name: str) -> None:
    case = CASES[name](4)
    pool, _ = make_pool(9, case.row_shape, 0, torch.float32, "cuda")
    tokens, fixed = ({k: t.cuda() for k, t in part.items()} for part in (case.tokens, case.fixed))
    slot_B = torch.tensor([3, 5, 0, 0], dtype=torch.int32, device="cuda")
    case.in_place(pool, slot_B, **tokens, **fixed, null=0)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.in_place(pool, slot_B, **tokens, **fixed, null=0)
    slot_B.copy_(torch.tensor([7, 2, 4, 0]))
    other = pool.clone()
    graph.replay()
    expected = case.in_place(other, slot_B, **tokens, **fixed, null=0)
    assert torch.equal(got, expected)
    assert torch.equal(pool, other)


@pytest.mark.gpu
@_NO_GPU
def test_operators_are_what_they_say() -> None:
    from hybridize.ops.causal_conv.triton_step import step_triton as conv_step
    from hybridize.ops.delta_rule.triton_step import step_triton as delta_step
    from hybridize.ops.gated_norm.triton import gated_norm_triton
    from hybridize.ops.selective_scan.triton_step import selective_scan_step_triton
    from hybridize.ops.ssd.triton_step import ssd_step_triton

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    check = torch.library.opcheck
    check(
        delta_step,
        (draw(3, 4, 12, 20), draw(3, 4, 12), draw(3, 2, 12), draw(3, 2, 20), -draw(3, 4).abs(), draw(3, 4), 0.3),
    )
    ssd_inputs = (draw(3, 4, 20, 12), draw(3, 2, 20), draw(3, 4), -draw(4).abs(), draw(3, 2, 12), draw(3, 4, 12))
    check(ssd_step_triton, (*ssd_inputs, draw(4), None, True))
    scan_inputs = (draw(3, 24, 5), draw(3, 24), draw(3, 24), -draw(24, 5).abs(), draw(3, 2, 5), draw(3, 4, 5))
    check(selective_scan_step_triton, (*scan_inputs, None, draw(24), draw(3, 24), True))
    check(conv_step, (draw(3, 24, 4).bfloat16(), draw(3, 12), draw(24, 4), draw(24), True, 3, 2))
    check(gated_norm_triton, (draw(2, 3, 48)[..., :24], draw(2, 3, 24), None, draw(12), True, 12, 1e-5, False))

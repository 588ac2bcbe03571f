"""The selective scan on a GPU: Triton kernels behind one PyTorch operator, safe to compile and to checkpoint.

Kept for the backward are the inputs and one state per chunk of tokens, N / chunk numbers per token and channel; nothing
of size tokens x D x N is ever in memory. Where documents start is read from the mask itself, token by token; a start
costs no pass of its own and no wait for the GPU.

Legend: B batch, L length, D channels (d_inner), N states per channel, H heads, G groups of heads; S segments that run
side by side, K kept states.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridize.ops.launch import on_its_device
from hybridize.ops.selective_scan.triton_backward import scan_backward_kernel, segment_grads_kernel
from hybridize.ops.selective_scan.triton_forward import carry_kernel, scan_kernel, segment_states_kernel

# Whether the kernels run on a CPU, in Triton's interpreter; settled when they are defined.
_INTERPRETED = triton.knobs.runtime.interpret
# How many warps a card should have to choose from; measured on an H100 (132 multiprocessors).
_WARPS_WANTED = 2048
# Tokens between two kept states; a segment is at least as long.
_KEPT_EVERY = 128
# A segment's longest, so that offsets within it fit 32 bits.
_LONGEST_SEGMENT = 32768


class _Tuning(NamedTuple):
    """What was measured to be best for 16 states: tokens of a tile, and how many tiles ahead it loads."""

    tokens: int
    stages: int


_FORWARD = _Tuning(tokens=8, stages=3)
_BACKWARD = _Tuning(tokens=4, stages=3)


class _Shape(NamedTuple):
    """How a kernel cuts its work: T tokens and C channels of a head per program, N padded to W x R states."""

    tokens: int
    per_block: int
    lanes: int
    registers: int
    num_warps: int
    blocks_per_head: int

    @property
    def block_numel(self) -> int:
        return self.per_block * self.lanes * self.registers

    def options(self, tuning: _Tuning) -> dict[str, int]:
        return {
            "T": self.tokens,
            "PER_BLOCK": self.per_block,
            "W": self.lanes,
            "R": self.registers,
            "STAGES": tuning.stages,
            "num_warps": self.num_warps,
        }


def _shape(num_states: int, per_head: int, tuning: _Tuning) -> _Shape:
    """Cut the work of a head; the same but for the tokens of a tile whatever the tuning."""
    states = triton.next_power_of_2(num_states)
    lanes = min(4, states)
    # With many states a head is wide, and is kept whole: each further part of it would write its own sums for B and C.
    per_block = min(triton.next_power_of_2(per_head), 16 if states <= 16 else 64)
    num_warps = min(8, max(1, per_block * states // 512))
    per_lane = max(8, per_block * states // (32 * num_warps))
    tokens = max(2, tuning.tokens * 8 // per_lane)
    return _Shape(tokens, per_block, lanes, states // lanes, num_warps, triton.cdiv(per_head, per_block))


class _Cut(NamedTuple):
    """Segments of a sequence: how many, tiles in each; chunks: tiles in each, how many."""

    segments: int
    tiles: int
    chunk: int
    kept: int


def _cut(shape: _Shape, batch: int, length: int, programs: int) -> _Cut:
    chunk = _KEPT_EVERY // shape.tokens
    num_chunks = triton.cdiv(length, _KEPT_EVERY)
    wanted = max(_WARPS_WANTED // (batch * programs * shape.num_warps), triton.cdiv(length, _LONGEST_SEGMENT), 1)
    segments = min(wanted, num_chunks)
    chunks = triton.cdiv(num_chunks, segments)
    return _Cut(triton.cdiv(num_chunks, chunks), chunks * chunk, chunk, num_chunks)


def _rows(tensor: Tensor) -> Tensor:
    """Make the axes after the second one contiguous, and tokens so near that a segment's places fit into 32 bits."""
    expected = 1
    if tensor.stride(1) >= 2**16:
        return tensor.contiguous()
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size > 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


class _Sizes(NamedTuple):
    batch: int
    length: int
    num_channels: int
    num_states: int
    per_head: int
    heads_per_group: int


def _sizes(x_BLD: Tensor, A_DN: Tensor, B_BLGN: Tensor, C_BLHN: Tensor) -> _Sizes:
    batch, length, num_channels = x_BLD.shape
    num_groups, num_heads = B_BLGN.shape[2], C_BLHN.shape[2]
    return _Sizes(batch, length, num_channels, A_DN.shape[1], num_channels // num_heads, num_heads // num_groups)


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]


@torch.library.custom_op("hybridize::selective_scan", mutates_args=())
@on_its_device
def _scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    D_D: Tensor | None,
    dt_bias_D: Tensor | None,
    z_BLD: Tensor | None,
    starts_BL: Tensor | None,
    initial_state_BDN: Tensor | None,
    dt_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _sizes(x_BLD, A_DN, B_BLGN, C_BLHN)
    batch, length, num_channels, num_states, per_head, heads_per_group = sizes
    shape = _shape(num_states, per_head, _FORWARD)
    x_BLD, dt_BLD, B_BLGN, C_BLHN = _rows(x_BLD), _rows(dt_BLD), _rows(B_BLGN), _rows(C_BLHN)
    z_BLD = None if z_BLD is None else _rows(z_BLD)
    starts_BL = None if starts_BL is None else starts_BL.contiguous()
    programs = num_channels // per_head * shape.blocks_per_head
    cut = _cut(shape, batch, length, programs)
    grid = (programs, cut.segments, batch)
    y_BLD = x_BLD.new_empty(batch, length, num_channels)
    exact = x_BLD.new_empty(0, dtype=torch.float32)
    final_BDN = exact.new_empty(batch, num_channels, num_states)
    kept = exact.new_empty(batch, cut.kept if keep else 0, programs, shape.block_numel)
    before_BSDN = initial_state_BDN
    has_bias, has_starts = dt_bias_D is not None, starts_BL is not None
    if cut.segments > 1:
        before_BSDN = exact.new_empty(batch, cut.segments, num_channels, num_states)
        total_BSD = exact.new_empty(batch, cut.segments, num_channels)
        segment_states_kernel[programs, cut.segments - 1, batch](
            x_BLD, dt_BLD, A_DN, B_BLGN, dt_bias_D if has_bias else A_DN, starts_BL if has_starts else A_DN,
            before_BSDN, total_BSD, length, cut.tiles, cut.segments, num_channels, 1,
            *_strides(x_BLD, dt_BLD, B_BLGN),
            N=num_states, PER_HEAD=per_head, HEADS_PER_GROUP=heads_per_group, SOFTPLUS=dt_softplus,
            HAS_BIAS=has_bias, HAS_STARTS=has_starts, **shape.options(_FORWARD),
        )  # fmt: skip
        _carry(before_BSDN, total_BSD, A_DN, initial_state_BDN, reverse=False)
    scan_kernel[grid](
        x_BLD, dt_BLD, A_DN, B_BLGN, C_BLHN, A_DN if D_D is None else D_D, dt_bias_D if has_bias else A_DN,
        x_BLD if z_BLD is None else z_BLD, starts_BL if has_starts else A_DN,
        A_DN if before_BSDN is None else before_BSDN, y_BLD, final_BDN, kept,
        length, cut.tiles, cut.segments, num_channels, cut.kept, 1,
        *_strides(x_BLD, dt_BLD, B_BLGN, C_BLHN, z_BLD),
        N=num_states, PER_HEAD=per_head, HEADS_PER_GROUP=heads_per_group, SOFTPLUS=dt_softplus,
        HAS_D=D_D is not None, HAS_BIAS=has_bias, HAS_Z=z_BLD is not None, HAS_STARTS=has_starts,
        HAS_INITIAL=before_BSDN is not None, KEEP=keep, CHUNK=cut.chunk, **shape.options(_FORWARD),
    )  # fmt: skip
    return y_BLD, final_BDN, kept


def _carry(state_BSDN: Tensor, total_BSD: Tensor, A_DN: Tensor, initial_BDN: Tensor | None, reverse: bool) -> None:
    batch, num_segments, num_channels, num_states = state_BSDN.shape
    block = 256
    carry_kernel[(triton.cdiv(num_channels * num_states, block), batch)](
        state_BSDN, total_BSD, A_DN, A_DN if initial_BDN is None else initial_BDN, num_segments, num_channels,
        N=num_states, HAS_INITIAL=initial_BDN is not None, REVERSE=reverse, BLOCK=block, num_warps=4,
    )  # fmt: skip


@_scan.register_fake
def _(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    D_D: Tensor | None,
    dt_bias_D: Tensor | None,
    z_BLD: Tensor | None,
    starts_BL: Tensor | None,
    initial_state_BDN: Tensor | None,
    dt_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, num_channels = x_BLD.shape
    num_kept = (length + _KEPT_EVERY - 1) // _KEPT_EVERY if keep else 0
    per_head = num_channels // C_BLHN.shape[2]
    shape = _shape(A_DN.shape[1], per_head, _FORWARD)
    programs = C_BLHN.shape[2] * shape.blocks_per_head
    final_BDN = x_BLD.new_empty(batch, num_channels, A_DN.shape[1], dtype=torch.float32)
    kept = final_BDN.new_empty(batch, num_kept, programs, shape.block_numel)
    return x_BLD.new_empty(batch, length, num_channels), final_BDN, kept


@torch.library.custom_op("hybridize::selective_scan_backward", mutates_args=())
@on_its_device
def _scan_backward(
    dy_BLD: Tensor,
    dfinal_BDN: Tensor | None,
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    D_D: Tensor | None,
    dt_bias_D: Tensor | None,
    z_BLD: Tensor | None,
    starts_BL: Tensor | None,
    kept: Tensor,
    dt_softplus: bool,
) -> list[Tensor]:
    sizes = _sizes(x_BLD, A_DN, B_BLGN, C_BLHN)
    batch, length, num_channels, num_states, per_head, heads_per_group = sizes
    num_heads = num_channels // per_head
    shape = _shape(num_states, per_head, _BACKWARD)
    dy_BLD, x_BLD, dt_BLD, B_BLGN, C_BLHN = (_rows(t) for t in (dy_BLD, x_BLD, dt_BLD, B_BLGN, C_BLHN))
    z_BLD = None if z_BLD is None else _rows(z_BLD)
    starts_BL = None if starts_BL is None else starts_BL.contiguous()
    blocks = shape.blocks_per_head
    programs = num_heads * blocks
    cut = _cut(shape, batch, length, programs)
    grid = (programs, cut.segments, batch)
    has_bias, has_starts, has_z = dt_bias_D is not None, starts_BL is not None, z_BLD is not None
    exact = x_BLD.new_empty(0, dtype=torch.float32)

    after_BSDN = None if dfinal_BDN is None else dfinal_BDN.contiguous()
    if cut.segments > 1:
        dfinal_BDN = after_BSDN
        after_BSDN = exact.new_empty(batch, cut.segments, num_channels, num_states)
        total_BSD = exact.new_empty(batch, cut.segments, num_channels)
        segment_grads_kernel[programs, cut.segments - 1, batch](
            dy_BLD, dt_BLD, A_DN, C_BLHN, dt_bias_D if has_bias else A_DN, x_BLD if z_BLD is None else z_BLD,
            starts_BL if has_starts else A_DN, after_BSDN, total_BSD,
            length, cut.tiles, cut.segments, num_channels, 1, *_strides(dy_BLD, dt_BLD, C_BLHN, z_BLD),
            N=num_states, PER_HEAD=per_head, SOFTPLUS=dt_softplus, HAS_BIAS=has_bias, HAS_Z=has_z,
            HAS_STARTS=has_starts, **shape.options(_BACKWARD),
        )  # fmt: skip
        _carry(after_BSDN, total_BSD, A_DN, dfinal_BDN, reverse=True)

    parts = heads_per_group * blocks
    dx_BLD, ddt_BLD = x_BLD.new_empty(batch, length, num_channels), dt_BLD.new_empty(batch, length, num_channels)
    dz_BLD = ddt_BLD.new_empty(0) if z_BLD is None else z_BLD.new_empty(batch, length, num_channels)
    dB = B_BLGN.new_empty(batch, length, B_BLGN.shape[2], parts, num_states, dtype=None if parts == 1 else exact.dtype)
    dC = C_BLHN.new_empty(batch, length, num_heads, blocks, num_states, dtype=None if blocks == 1 else exact.dtype)
    dA_BSDN = exact.new_empty(batch, cut.segments, num_channels, num_states)
    dD_BSD = exact.new_empty(batch, cut.segments, num_channels)
    dbias_BSD = torch.empty_like(dD_BSD)
    dinitial_BDN = exact.new_empty(batch, num_channels, num_states)
    scratch = exact.new_empty(batch * cut.segments * programs, cut.chunk, shape.block_numel)
    scan_backward_kernel[grid](
        dy_BLD, x_BLD, dt_BLD, A_DN, B_BLGN, C_BLHN, A_DN if D_D is None else D_D, dt_bias_D if has_bias else A_DN,
        x_BLD if z_BLD is None else z_BLD, starts_BL if has_starts else A_DN, kept,
        A_DN if after_BSDN is None else after_BSDN, scratch,
        dx_BLD, ddt_BLD, dB, dC, dz_BLD, dA_BSDN, dD_BSD, dbias_BSD, dinitial_BDN,
        length, cut.tiles, cut.segments, num_channels, cut.kept, 1,
        *_strides(dy_BLD, x_BLD, dt_BLD, B_BLGN, C_BLHN, z_BLD),
        N=num_states, PER_HEAD=per_head, HEADS_PER_GROUP=heads_per_group, SOFTPLUS=dt_softplus,
        HAS_D=D_D is not None, HAS_BIAS=has_bias, HAS_Z=has_z, HAS_STARTS=has_starts,
        HAS_AFTER=after_BSDN is not None, CHUNK=cut.chunk, **shape.options(_BACKWARD),
    )  # fmt: skip
    dB_BLGN = dB.squeeze(3) if parts == 1 else dB.sum(dim=3).to(B_BLGN.dtype)
    dC_BLHN = dC.squeeze(3) if blocks == 1 else dC.sum(dim=3).to(C_BLHN.dtype)
    return [
        dx_BLD, ddt_BLD, dA_BSDN.sum(dim=(0, 1)), dB_BLGN, dC_BLHN, dD_BSD.sum(dim=(0, 1)), dbias_BSD.sum(dim=(0, 1)),
        dz_BLD, dinitial_BDN,
    ]  # fmt: skip


@_scan_backward.register_fake
def _(
    dy_BLD: Tensor,
    dfinal_BDN: Tensor | None,
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    D_D: Tensor | None,
    dt_bias_D: Tensor | None,
    z_BLD: Tensor | None,
    starts_BL: Tensor | None,
    kept: Tensor,
    dt_softplus: bool,
) -> list[Tensor]:
    batch, num_channels = x_BLD.shape[0], x_BLD.shape[2]

    def like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    exact_D = x_BLD.new_empty(num_channels, dtype=torch.float32)
    dz_BLD = dt_BLD.new_empty(0) if z_BLD is None else like(z_BLD)
    dinitial_BDN = exact_D.new_empty(batch, num_channels, A_DN.shape[1])
    return [
        like(x_BLD), like(dt_BLD), like(A_DN), like(B_BLGN), like(C_BLHN), exact_D, torch.empty_like(exact_D), dz_BLD,
        dinitial_BDN,
    ]  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.dt_softplus, _ = inputs
    ctx.has_initial = tensors.pop() is not None
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_BLD: Tensor | None, dfinal_BDN: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x_BLD, dt_BLD, A_DN, B_BLGN, C_BLHN, D_D, dt_bias_D, z_BLD, starts_BL, kept = ctx.saved_tensors
    if dy_BLD is None:
        if dfinal_BDN is None:
            return (None,) * 12
        dy_BLD = torch.zeros_like(x_BLD)
    dx, ddt, dA, dB, dC, dD, dbias, dz, dinitial = _scan_backward(
        dy_BLD, dfinal_BDN, x_BLD, dt_BLD, A_DN, B_BLGN, C_BLHN, D_D, dt_bias_D, z_BLD, starts_BL, kept,
        ctx.dt_softplus,
    )  # fmt: skip
    return (
        dx, ddt, dA, dB, dC, None if D_D is None else dD, None if dt_bias_D is None else dbias,
        None if z_BLD is None else dz, None, dinitial if ctx.has_initial else None, None, None,
    )  # fmt: skip


_scan.register_autograd(_backward, setup_context=_setup_context)


def selective_scan_triton(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    *,
    D_D: Tensor | None = None,
    dt_bias_D: Tensor | None = None,
    dt_softplus: bool = True,
    z_BLD: Tensor | None = None,
    starts_BL: Tensor | None = None,
    initial_state_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan on a GPU, with sums and states in fp32.

    The arguments are those of `hybridize.ops.selective_scan.selective_scan`, already checked; whether A is negative is
    not, since that would wait for the GPU: an entry that is not counts as the slowest decay.

    Returns:
        y of shape [B, L, D] in x's dtype, and the state after the last token, [B, D, N], fp32.

    Raises:
        ValueError: x is in fp64, or not on a GPU (and Triton's interpreter is off).
    """
    if not x_BLD.is_cuda and not _INTERPRETED:
        raise ValueError(f"x_BLD: on {x_BLD.device}; the triton backend needs a GPU, use backend='chunked'")
    if x_BLD.dtype == torch.float64:
        raise ValueError("x_BLD: dtype torch.float64; the triton backend computes in fp32, use backend='chunked'")

    def exact(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.float().contiguous()

    A_DN, D_D, dt_bias_D = A_DN.float().contiguous(), exact(D_D), exact(dt_bias_D)
    initial_state_BDN = exact(initial_state_BDN)
    inputs = (x_BLD, dt_BLD, A_DN, B_BLGN, C_BLHN, D_D, dt_bias_D, z_BLD, starts_BL, initial_state_BDN)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y_BLD, final_BDN, _ = _scan(*inputs, dt_softplus, keep)
    return y_BLD, final_BDN

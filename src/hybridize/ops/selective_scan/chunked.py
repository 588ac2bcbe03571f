"""The selective scan in plain torch, blocked for a CPU's caches, with a hand-written backward.

Two ideas make it fast. First, everything that does not depend on the previous token (decays, drives,
read-outs) is done for a block of tokens at once, in buffers [tokens, N, D] reused from block to block; D is
innermost because it is the axis along which x, the step size and A vary, so no operand is ever repeated or
permuted. Second, the recurrence itself runs over all chunks of a block side by side: once to learn what each
chunk adds to the state, then a short loop over chunks to carry the state, then again from the right states.
Where one token's state is large enough to fill an operator call, the block is a single chunk and needs no
first run.

Autograd keeps the inputs and one state per block; the backward recomputes a block's states from there, so
memory grows with tokens x D, not tokens x D x N. Only exponentials of non-positive numbers are taken, so no
step size and no decay can overflow.

Legend: B batch, L length, D channels, N states per channel, H heads, G groups of heads; K chunks of a block,
Q tokens of a chunk, T = K x Q tokens of a block. `drive` is what a token adds to the state.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, silu, softplus

# A step size that forgets everything: times any A below, it is far enough under zero for exp2 to give 0.
_FORGET = 1e30
_SLOWEST_DECAY = -1e-20

# Sizes in numbers of a buffer, measured on two cores with 1 MiB of L2 each.
_BLOCK_NUMEL = 1 << 20
_CALL_NUMEL = 1 << 16


class _Plan(NamedTuple):
    """How a scan is cut: sequences per pass, tokens per block (T), tokens per chunk (Q; 0: one chunk)."""

    batch: int
    block: int
    chunk: int


def _plan(batch: int, length: int, state_numel: int) -> _Plan:
    per_pass = min(batch, max(1, _CALL_NUMEL // state_numel))
    row_numel = per_pass * state_numel
    num_chunks = min(_CALL_NUMEL // row_numel, 64)
    block = max(16, _BLOCK_NUMEL // row_numel)
    if num_chunks < 2 or length < 64:
        return _Plan(per_pass, min(block, length), 0)
    chunk = max(8, min(block, length) // num_chunks)
    return _Plan(per_pass, max(1, block // chunk) * chunk, chunk)


def _spans(plan: _Plan, batch: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks, as slices of the batch and of time, in time order for each pass over the batch."""
    for b in range(0, batch, plan.batch):
        for t in range(0, length, plan.block):
            yield slice(b, min(b + plan.batch, batch)), slice(t, min(t + plan.block, length))


def _scan_(decay_BTS: Tensor, drive_BTS: Tensor, total_BKS: Tensor | None, carry_BS: Tensor) -> None:
    """Turn drives into states, in place: s_t = decay_t s_{t-1} + drive_t, from the state `carry_BS`.

    `total_BKS` is the product of the decays of each chunk; None: one chunk.
    """
    if total_BKS is None:
        state = carry_BS
        for decay, drive in zip(decay_BTS.unbind(1), drive_BTS.unbind(1), strict=True):
            state = drive.addcmul_(decay, state)
        return
    num_chunks = total_BKS.shape[1]
    decay_q = decay_BTS.unflatten(1, (num_chunks, -1)).unbind(2)
    drive_q = drive_BTS.unflatten(1, (num_chunks, -1)).unbind(2)
    added_BKS = drive_q[0].clone()
    for decay, drive in zip(decay_q[1:], drive_q[1:], strict=True):
        torch.addcmul(drive, decay, added_BKS, out=added_BKS)
    # From here on added_BKS[:, k] becomes the state before chunk k + 1.
    state = carry_BS
    for total, added in zip(total_BKS.unbind(1), added_BKS.unbind(1), strict=True):
        state = added.addcmul_(total, state)
    before_BKS = torch.cat([carry_BS.unsqueeze(1), added_BKS[:, :-1]], dim=1)
    for decay, drive in zip(decay_q, drive_q, strict=True):
        before_BKS = drive.addcmul_(decay, before_BKS)


def _scan_reverse_(decay_BTS: Tensor, grad_BTS: Tensor, total_BKS: Tensor | None, carry_BS: Tensor) -> Tensor:
    """Run the adjoint recurrence in place: g_t = grad_t + decay_{t+1} g_{t+1}.

    `carry_BS` is the gradient of the state after the block; the one of the state before it is returned.
    """
    if total_BKS is None:
        decays, grads = decay_BTS.unbind(1), grad_BTS.unbind(1)
        grad = grads[-1].add_(carry_BS)
        for t in range(len(grads) - 2, -1, -1):
            grad = grads[t].addcmul_(decays[t + 1], grad)
        return decays[0] * grad
    num_chunks = total_BKS.shape[1]
    decay_q = decay_BTS.unflatten(1, (num_chunks, -1)).unbind(2)
    grad_q = grad_BTS.unflatten(1, (num_chunks, -1)).unbind(2)
    added_BKS = grad_q[-1].clone()
    for q in range(len(grad_q) - 2, -1, -1):
        torch.addcmul(grad_q[q], decay_q[q + 1], added_BKS, out=added_BKS)
    added_BKS.mul_(decay_q[0])
    # From here on added_BKS[:, k] becomes the gradient of the state before chunk k.
    totals, added = total_BKS.unbind(1), added_BKS.unbind(1)
    grad = carry_BS
    for k in range(num_chunks - 1, -1, -1):
        grad = added[k].addcmul_(totals[k], grad)
    after_BKS = torch.cat([added_BKS[:, 1:], carry_BS.unsqueeze(1)], dim=1)
    state_grad = grad_q[-1].add_(after_BKS)
    for q in range(len(grad_q) - 2, -1, -1):
        state_grad = grad_q[q].addcmul_(decay_q[q + 1], state_grad)
    return added[0].clone()


class _Inputs(NamedTuple):
    """What both passes read, padded to whole chunks with tokens of step size zero, which change nothing.

    All but A are [B, L, D] or [B, L, N, heads or groups].
    """

    gap: Tensor  # the step size, or _FORGET where a document starts
    drive: Tensor  # step size times x
    A_ND: Tensor  # times log2(e), so that decays are powers of two
    B_BLNG: Tensor
    C_BLNH: Tensor


def _prepare(
    plan: _Plan,
    x_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    starts_BL: Tensor | None,
) -> _Inputs:
    gap_BLD = delta_BLD
    if starts_BL is not None:
        gap_BLD = delta_BLD.masked_fill(starts_BL.unsqueeze(-1), _FORGET)
    drive_BLD = delta_BLD * x_BLD
    B_BLNG, C_BLNH = B_BLGN.transpose(2, 3), C_BLHN.transpose(2, 3).contiguous()
    missing = -x_BLD.shape[1] % plan.chunk if plan.chunk else 0
    if missing:
        gap_BLD, drive_BLD = (pad(t, (0, 0, 0, missing)) for t in (gap_BLD, drive_BLD))
        B_BLNG, C_BLNH = (pad(t, (0, 0, 0, 0, 0, missing)) for t in (B_BLNG, C_BLNH))
    A_ND = A_DN.t().contiguous().clamp(max=_SLOWEST_DECAY).mul_(1 / math.log(2))
    return _Inputs(gap_BLD, drive_BLD, A_ND, B_BLNG, C_BLNH)


def _per_group(tensor_BTND: Tensor, num_groups: int) -> Tensor:
    return tensor_BTND.unflatten(-1, (num_groups, -1))


def _fill_states_(
    inputs: _Inputs,
    plan: _Plan,
    span: tuple[slice, slice],
    carry_BND: Tensor,
    decay_BTND: Tensor,
    state_BTND: Tensor,
) -> Tensor | None:
    """Compute a block's decays and states into the buffers; return the decay over each chunk, if any."""
    gap_BTD = inputs.gap[span]
    torch.mul(gap_BTD.unsqueeze(2), inputs.A_ND, out=decay_BTND).exp2_()
    B_BTNG = inputs.B_BLNG[span]
    torch.mul(
        _per_group(inputs.drive[span].unsqueeze(2), B_BTNG.shape[-1]),
        B_BTNG.unsqueeze(-1),
        out=_per_group(state_BTND, B_BTNG.shape[-1]),
    )
    total_BKS = None
    if plan.chunk:
        gap_BKD = gap_BTD.unflatten(1, (-1, plan.chunk)).sum(dim=2)
        total_BKS = (gap_BKD.unsqueeze(2) * inputs.A_ND).exp2_().flatten(2)
    _scan_(decay_BTND.flatten(2), state_BTND.flatten(2), total_BKS, carry_BND.flatten(1))
    return total_BKS


def _forward(
    x_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    starts_BL: Tensor | None,
    initial_state_BDN: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y [B, L, D], the final state [B, D, N] and, if asked, the states before each block."""
    batch, length, num_channels = x_BLD.shape
    num_states, num_heads = A_DN.shape[1], C_BLHN.shape[2]
    plan = _plan(batch, length, A_DN.numel())
    inputs = _prepare(plan, x_BLD, delta_BLD, A_DN, B_BLGN, C_BLHN, starts_BL)
    y_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
    state_BND = x_BLD.new_zeros(batch, num_states, num_channels)
    if initial_state_BDN is not None:
        state_BND.copy_(initial_state_BDN.transpose(1, 2))
    decay_buffer = x_BLD.new_empty(plan.batch, plan.block, num_states, num_channels)
    state_buffer = torch.empty_like(decay_buffer)
    kept = []
    for span in _spans(plan, batch, inputs.gap.shape[1]):
        rows, tokens = inputs.gap[span].shape[:2]
        decay_BTND, state_BTND = decay_buffer[:rows, :tokens], state_buffer[:rows, :tokens]
        if keep_states:
            kept.append(state_BND[span[0]].clone())
        _fill_states_(inputs, plan, span, state_BND[span[0]], decay_BTND, state_BTND)
        state_BND[span[0]] = state_BTND[:, -1]
        _per_group(state_BTND, num_heads).mul_(inputs.C_BLNH[span].unsqueeze(-1))
        y_BTD = y_BLD[span]
        torch.sum(state_BTND[:, : y_BTD.shape[1]], dim=2, out=y_BTD)
    return y_BLD, state_BND.transpose(1, 2).contiguous(), kept


class _Scan(torch.autograd.Function):
    """The recurrence alone: step sizes after softplus in, y before the skip and the gate out."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BLD: Tensor,
        delta_BLD: Tensor,
        A_DN: Tensor,
        B_BLGN: Tensor,
        C_BLHN: Tensor,
        starts_BL: Tensor | None,
        initial_state_BDN: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y_BLD, state_BDN, kept = _forward(
            x_BLD, delta_BLD, A_DN, B_BLGN, C_BLHN, starts_BL, initial_state_BDN, keep_states=True
        )
        ctx.save_for_backward(x_BLD, delta_BLD, A_DN, B_BLGN, C_BLHN, starts_BL, *kept)
        return y_BLD, state_BDN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor, dstate_BDN: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, delta_BLD, A_DN, B_BLGN, C_BLHN, starts_BL, *kept = ctx.saved_tensors
        batch, length, num_channels = x_BLD.shape
        num_states, num_heads, num_groups = A_DN.shape[1], C_BLHN.shape[2], B_BLGN.shape[2]
        plan = _plan(batch, length, A_DN.numel())
        inputs = _prepare(plan, x_BLD, delta_BLD, A_DN, B_BLGN, C_BLHN, starts_BL)
        padded = inputs.gap.shape[1]
        dy_BLD = pad(dy_BLD, (0, 0, 0, padded - length)) if padded > length else dy_BLD
        # Gradients of drive = delta x, of the decay's exponent summed over states, of A, B, C and the state.
        ddrive_BLD, dgap_BLD = torch.empty_like(inputs.drive), torch.empty_like(inputs.drive)
        dB_BLNG, dC_BLNH = torch.empty_like(inputs.B_BLNG), torch.empty_like(inputs.C_BLNH)
        dA_ND = torch.zeros_like(inputs.A_ND)
        dstate_BND = dstate_BDN.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        A_ND = A_DN.t().contiguous()
        buffers = x_BLD.new_empty(4, plan.batch, plan.block, num_states, num_channels)
        spans = list(_spans(plan, batch, padded))
        for index in range(len(spans) - 1, -1, -1):
            span, before_BND = spans[index], kept[index]
            dy_BTD = dy_BLD[span]
            decay, state, grad, product = buffers[:, : dy_BTD.shape[0], : dy_BTD.shape[1]]
            total_BKS = _fill_states_(inputs, plan, span, before_BND, decay, state)
            dy_heads = _per_group(dy_BTD.unsqueeze(2), num_heads)
            torch.mul(dy_heads, inputs.C_BLNH[span].unsqueeze(-1), out=_per_group(grad, num_heads))
            torch.mul(state, dy_BTD.unsqueeze(2), out=product)
            dC_BLNH[span] = _per_group(product, num_heads).sum(dim=-1)
            carry_BS = _scan_reverse_(decay.flatten(2), grad.flatten(2), total_BKS, dstate_BND[span[0]].flatten(1))
            dstate_BND[span[0]] = carry_BS.unflatten(1, (num_states, num_channels))
            torch.mul(grad, inputs.drive[span].unsqueeze(2), out=product)
            dB_BLNG[span] = _per_group(product, num_groups).sum(dim=-1)
            torch.mul(
                _per_group(grad, num_groups),
                inputs.B_BLNG[span].unsqueeze(-1),
                out=_per_group(product, num_groups),
            )
            torch.sum(product, dim=2, out=ddrive_BLD[span])
            # The exponent delta A: its gradient is g_t decay_t s_{t-1}, exactly 0 where a document starts.
            grad.mul_(decay)
            grad[:, 1:].mul_(state[:, :-1])
            grad[:, 0].mul_(before_BND)
            torch.mul(grad, A_ND, out=product)
            torch.sum(product, dim=2, out=dgap_BLD[span])
            grad.mul_(inputs.gap[span].unsqueeze(2))
            dA_ND += grad.sum(dim=(0, 1))
        ddrive_BLD, dgap_BLD = ddrive_BLD[:, :length], dgap_BLD[:, :length]
        return (
            ddrive_BLD * delta_BLD,
            torch.addcmul(dgap_BLD, ddrive_BLD, x_BLD),
            dA_ND.t(),
            dB_BLNG[:, :length].transpose(2, 3),
            dC_BLNH[:, :length].transpose(2, 3),
            None,
            dstate_BND.transpose(1, 2) if ctx.needs_input_grad[6] else None,
        )


def selective_scan_chunked(
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
    """Scan in cache-sized blocks of tokens.

    The arguments are those of `hybridize.ops.selective_scan.selective_scan`, already checked.

    Returns:
        y of shape [B, L, D] in x's dtype, and the state after the last token, [B, D, N].

    Raises:
        ValueError: A has a positive entry, a state that would grow.
    """
    dtype = torch.promote_types(x_BLD.dtype, torch.float32)
    if not A_DN.is_meta and bool((A_DN > 0).any()):
        raise ValueError("A_DN: has positive entries, a growing state; pass -exp(A_log)")
    delta_BLD = dt_BLD.to(dtype)
    if dt_bias_D is not None:
        delta_BLD = delta_BLD + dt_bias_D.to(dtype)
    if dt_softplus:
        delta_BLD = softplus(delta_BLD)
    x = x_BLD.to(dtype)
    args = (x, delta_BLD, A_DN.to(dtype), B_BLGN.to(dtype), C_BLHN.to(dtype), starts_BL, initial_state_BDN)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args):
        y_BLD, state_BDN = _Scan.apply(*args)
    else:
        y_BLD, state_BDN, _ = _forward(*args, keep_states=False)
    if D_D is not None:
        y_BLD = torch.addcmul(y_BLD, x, D_D.to(dtype))
    if z_BLD is not None:
        y_BLD = y_BLD * silu(z_BLD.to(dtype))
    return y_BLD.to(x_BLD.dtype), state_BDN

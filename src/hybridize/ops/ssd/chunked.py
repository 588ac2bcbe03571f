"""State space duality in plain torch: matrix products over chunks of tokens, with a hand-written backward.

Within a chunk the recurrence is attention without a softmax, whose scores are weighted by the decays between two
tokens; from chunk to chunk only the state passes on (arXiv 2405.21060, section 6). Heads of a group share x and B, so
their queries stand below one another in one product, and neither x nor B is ever repeated.

The gradient of a decay is a sum over the pairs of tokens that it stands between, taken as such, not as a difference of
sums that nearly cancel. Autograd keeps the inputs and one state per block of chunks; the backward recomputes the rest
from there. Sequences are cut into blocks that fit a CPU's cache, or that fill a GPU.

Legend: B batch, L length, H heads, G groups of heads, P channels of a head, N states per channel; K chunks of a block,
Q tokens of a chunk (a second one is called J), R heads of a group, M = B G K.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridize.ops.ssd.chunks import (
    Block,
    Inputs,
    Plan,
    cut_block,
    cut_heads,
    join_heads_,
    plan_scan,
    product,
    rounded_product,
)
from hybridize.ops.ssd.step_sizes import step_sizes


def _pass_on_(
    added_MRPN: Tensor, over_MR: Tensor, first_BGRPN: Tensor, plan: Plan, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Run S_k = over_k S_{k-1} + added_k over the chunks, in place, from `first`; from the last one if `reverse`.

    Returns:
        What each chunk is handed, [M, R, P, N], and what the last one hands on, [B, G, R, P, N]; copies.
    """
    state_BGKRPN, over_BGKR11 = plan.grouped(added_MRPN), plan.grouped(over_MR)[..., None, None]
    state, chunks = first_BGRPN, range(state_BGKRPN.shape[2])
    for k in reversed(chunks) if reverse else chunks:
        state = state_BGKRPN[:, :, k].addcmul_(over_BGKR11[:, :, k], state)
    first = first_BGRPN.unsqueeze(2)
    parts = [state_BGKRPN[:, :, 1:], first] if reverse else [first, state_BGKRPN[:, :, :-1]]
    return torch.cat(parts, dim=2).flatten(0, 2), state.clone()


def _added(block: Block, plan: Plan) -> tuple[Tensor, Tensor]:
    """What each chunk adds to the state, [M, R, P, N], and the weighted inputs it is made of, [M, R·P, Q]."""
    weight_MR1Q = (block.decays.after * block.delta).unsqueeze(-2)
    drive_MRPQ = rounded_product(block.x.unsqueeze(1), weight_MR1Q, plan)
    added_MSN = product(drive_MRPQ.flatten(1, 2), block.B, plan.dtype)
    return added_MSN.unflatten(1, drive_MRPQ.shape[1:3]), drive_MRPQ.flatten(1, 2)


def _scores(block: Block, D_H: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    """What a token reads of each one's x, [M, R, Q, J], with D; and the same without step sizes and D."""
    decayed_MRQJ = product(block.C.flatten(1, 2), block.B.transpose(1, 2), plan.dtype)
    decayed_MRQJ = decayed_MRQJ.view_as(block.decays.between).mul_(block.decays.between)
    scores_MRQJ = rounded_product(decayed_MRQJ, block.delta.unsqueeze(-2), plan)
    if D_H is not None:
        D_GR = D_H.unflatten(0, (plan.num_groups, -1))
        plan.grouped(scores_MRQJ.diagonal(dim1=-2, dim2=-1)).add_(D_GR[:, None, :, None])
    return scores_MRQJ, decayed_MRQJ


def _forward(
    inputs: Inputs, initial_state_BHPN: Tensor | None, plan: Plan, keep_states: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y [B, L, H, P], the final state [B, G, R, P, N] and, if asked, the states before each block."""
    x_BLGP, C_BLHN = inputs.x, inputs.C
    (batch, length, num_groups, width), (num_heads, num_states) = x_BLGP.shape, C_BLHN.shape[2:]
    y_BLHP = x_BLGP.new_empty(batch, length, num_heads, width)
    shape = (batch, num_groups, num_heads // num_groups, width, num_states)
    state_BGRPN = x_BLGP.new_zeros(shape, dtype=plan.dtype)
    if initial_state_BHPN is not None:
        state_BGRPN.copy_(initial_state_BHPN.unflatten(1, shape[1:3]))
    kept = []
    for span in plan.spans(length):
        if keep_states:
            kept.append(state_BGRPN)
        block = cut_block(inputs, span, plan)
        added_MRPN, _ = _added(block, plan)
        before_MRPN, state_BGRPN = _pass_on_(added_MRPN, block.decays.over, state_BGRPN, plan)
        scores_MRQJ, _ = _scores(block, inputs.D, plan)
        y_MSP = product(scores_MRQJ.flatten(1, 2), block.x.transpose(1, 2), plan.dtype)
        read_ZQP = product(block.C.flatten(0, 1), before_MRPN.to(plan.low).flatten(0, 1).transpose(1, 2), plan.dtype)
        y_MRQP = y_MSP.view((*block.C.shape[:3], width))
        y_MRQP.addcmul_(read_ZQP.view_as(y_MRQP), block.decays.until.unsqueeze(-1))
        join_heads_(y_BLHP[:, span], y_MRQP, plan)
    return y_BLHP, state_BGRPN, kept


class _Gradients(NamedTuple):
    """Gradients of the inputs, filled block by block; that of A and D per group and head."""

    x: Tensor  # [B, L, G, P]
    delta: Tensor  # [B, L, H]
    A: Tensor  # [G, R]
    B: Tensor  # [B, L, G, N]
    C: Tensor  # [B, L, H, N]
    D: Tensor  # [G, R]


def _backward_block(
    inputs: Inputs,
    span: slice,
    plan: Plan,
    state_BGRPN: Tensor,
    dstate_BGRPN: Tensor,
    dy_BLHP: Tensor,
    grads: _Gradients,
) -> Tensor:
    """Fill a block's gradients; from the gradient of the state after it to that of the state before it."""
    block, dtype = cut_block(inputs, span, plan), plan.dtype
    delta_MRQ, (between_MRQJ, until_MRQ, after_MRQ, over_MR) = block.delta, block.decays
    rows = block.C.shape[:3]  # M, R, Q
    dy_MRQP = cut_heads(dy_BLHP[:, span], plan, plan.low)
    x_MPQ, B_MQN, C_MRQN = block.x, block.B, block.C

    # The states, and their gradients, at the chunks' bounds.
    added_MRPN, drive_MSQ = _added(block, plan)
    before_MRPN, _ = _pass_on_(added_MRPN, over_MR, state_BGRPN, plan)
    del added_MRPN
    faded_dy_MRQP = rounded_product(dy_MRQP, until_MRQ.unsqueeze(-1), plan)
    read_ZPN = product(faded_dy_MRQP.flatten(0, 1).transpose(1, 2), C_MRQN.flatten(0, 1), dtype)
    dafter_MRPN, dstate_BGRPN = _pass_on_(read_ZPN.view_as(before_MRPN), over_MR, dstate_BGRPN, plan, reverse=True)
    del read_ZPN

    # What passes through the state. A logarithm's gradient is gathered in dlog.
    dover_MR = (dafter_MRPN * before_MRPN).sum(dim=(-2, -1)) * over_MR
    low_before, low_dafter = before_MRPN.to(plan.low), dafter_MRPN.to(plan.low)
    del before_MRPN, dafter_MRPN
    dC_MRQN = product(faded_dy_MRQP.flatten(0, 1), low_before.flatten(0, 1), dtype).view(C_MRQN.shape)
    dlog_MRQ = _reverse_cumsum((dC_MRQN * C_MRQN).sum(dim=-1)).add_(dover_MR.unsqueeze(-1))
    dB_MQN = product(drive_MSQ.transpose(1, 2), low_dafter.flatten(1, 2), dtype)
    ddrive_MRPQ = product(low_dafter.flatten(1, 2), B_MQN.transpose(1, 2), dtype).view(*rows[:2], -1, rows[2])
    dweight_MRQ = (ddrive_MRPQ * x_MPQ.unsqueeze(1)).sum(dim=2).mul_(after_MRQ)
    ddelta_MRQ = dweight_MRQ.clone()
    dlog_MRQ[..., 1:] += (dweight_MRQ * delta_MRQ).cumsum(dim=-1)[..., :-1]
    dx_MPQ = ddrive_MRPQ.mul_((after_MRQ * delta_MRQ).unsqueeze(2)).sum(dim=1)
    del low_before, low_dafter, ddrive_MRPQ, drive_MSQ, faded_dy_MRQP

    # What passes between the tokens of a chunk.
    scores_MRQJ, decayed_MRQJ = _scores(block, inputs.D, plan)
    dx_MPQ.add_(product(dy_MRQP.flatten(1, 2).transpose(1, 2), scores_MRQJ.flatten(1, 2), dtype))
    dscores_MRQJ = product(dy_MRQP.flatten(1, 2), x_MPQ, dtype).view_as(scores_MRQJ)
    del scores_MRQJ
    if inputs.D is not None:
        grads.D.add_(plan.grouped(dscores_MRQJ.diagonal(dim1=-2, dim2=-1).sum(dim=-1)).sum(dim=(0, 2)))
    pairs_MRQJ = decayed_MRQJ.mul_(dscores_MRQJ)
    ddelta_MRQ.add_(pairs_MRQJ.sum(dim=-2))
    dlog_MRQ.add_(_sum_around(pairs_MRQJ.mul_(delta_MRQ.unsqueeze(-2))))
    del pairs_MRQJ, decayed_MRQJ
    dscores_MRQJ = rounded_product(dscores_MRQJ.mul_(between_MRQJ), delta_MRQ.unsqueeze(-2), plan)
    dscores_MSJ = dscores_MRQJ.flatten(1, 2)
    dC_MRQN.add_(product(dscores_MSJ, B_MQN, dtype).view_as(dC_MRQN))
    dB_MQN.add_(product(dscores_MSJ.transpose(1, 2), C_MRQN.flatten(1, 2), dtype))

    A_GR = inputs.A.unflatten(0, (plan.num_groups, -1))
    grads.A.add_((plan.grouped(dlog_MRQ) * plan.grouped(delta_MRQ)).sum(dim=(0, 2, 4)))
    plan.grouped(ddelta_MRQ).addcmul_(plan.grouped(dlog_MRQ), A_GR[:, None, :, None])
    join_heads_(grads.x[:, span], dx_MPQ.transpose(1, 2).unsqueeze(1), plan)
    join_heads_(grads.B[:, span], dB_MQN.unsqueeze(1), plan)
    join_heads_(grads.C[:, span], dC_MRQN, plan)
    join_heads_(grads.delta[:, span], ddelta_MRQ, plan)
    return dstate_BGRPN


def _reverse_cumsum(tensor: Tensor) -> Tensor:
    return tensor.flip(-1).cumsum(dim=-1).flip(-1)


def _sum_around(pairs_MRQJ: Tensor) -> Tensor:
    """For each token t, the sum over the pairs it stands between: reader t or later, writer before t: [M, R, Q]."""
    num_tokens = pairs_MRQJ.shape[-1]
    earlier_QJ = pairs_MRQJ.new_ones(num_tokens, num_tokens).tril_(-1)
    not_before_QJ = earlier_QJ.t().clone().fill_diagonal_(1.0)
    by_reader = torch.matmul(not_before_QJ, pairs_MRQJ)
    return by_reader.mul_(earlier_QJ).sum(dim=-1)


class _Scan(torch.autograd.Function):
    """The scan and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BLGP: Tensor,
        delta_BLH: Tensor,
        A_H: Tensor,
        B_BLGN: Tensor,
        C_BLHN: Tensor,
        D_H: Tensor | None,
        starts_BL: Tensor | None,
        initial_state_BHPN: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(x_BLGP, delta_BLH, A_H, B_BLGN, C_BLHN, D_H, starts_BL)
        plan = plan_scan(x_BLGP, C_BLHN)
        y_BLHP, state_BGRPN, kept = _forward(inputs, initial_state_BHPN, plan, keep_states=True)
        ctx.save_for_backward(*inputs, *kept)
        return y_BLHP, state_BGRPN.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHP: Tensor, dstate_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing gives them out no more often
        inputs, kept = Inputs(*saved[:7]), saved[7:]
        plan = plan_scan(inputs.x, inputs.C)
        heads = inputs.A.unflatten(0, (plan.num_groups, -1))
        grads = _Gradients(
            torch.empty_like(inputs.x, memory_format=torch.contiguous_format),
            torch.empty_like(inputs.delta, memory_format=torch.contiguous_format),
            torch.zeros_like(heads),
            torch.empty_like(inputs.B, memory_format=torch.contiguous_format),
            torch.empty_like(inputs.C, memory_format=torch.contiguous_format),
            torch.zeros_like(heads),
        )
        dstate_BGRPN = dstate_BHPN.to(plan.dtype).unflatten(1, heads.shape)
        spans = plan.spans(inputs.x.shape[1])
        with torch.autocast(dy_BLHP.device.type, enabled=False):
            for span, state_BGRPN in zip(reversed(spans), reversed(kept), strict=True):
                dstate_BGRPN = _backward_block(inputs, span, plan, state_BGRPN, dstate_BGRPN, dy_BLHP, grads)
        return (
            grads.x,
            grads.delta,
            grads.A.flatten(),
            grads.B,
            grads.C,
            None if inputs.D is None else grads.D.flatten(),
            None,
            dstate_BGRPN.flatten(1, 2) if ctx.needs_input_grad[7] else None,
        )


def ssd_chunked(
    x_BLGP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = True,
    starts_BL: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan in chunks of tokens.

    The arguments are those of `hybridize.ops.ssd.ssd`, already checked.

    Returns:
        y of shape [B, L, H, P] in x's dtype, and the state after the last token, [B, H, P, N].
    """
    dtype = torch.promote_types(x_BLGP.dtype, torch.float32)
    delta_BLH = step_sizes(dt_BLH, dt_bias_H, dt_softplus, dtype)
    D_H = None if D_H is None else D_H.to(dtype)
    args = (x_BLGP, delta_BLH, A_H.to(dtype), B_BLGN, C_BLHN, D_H, starts_BL)
    with torch.autocast(x_BLGP.device.type, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*args, initial_state_BHPN)):
            return _Scan.apply(*args, initial_state_BHPN)
        plan = plan_scan(x_BLGP, C_BLHN)
        y_BLHP, state_BGRPN, _ = _forward(Inputs(*args), initial_state_BHPN, plan, keep_states=False)
        return y_BLHP, state_BGRPN.flatten(1, 2)

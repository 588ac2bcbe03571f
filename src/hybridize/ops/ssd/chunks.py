"""How state space duality is cut into chunks, laid out for matrix products, and its decays.

Decays are exponentials of differences of the logarithms' running sum, never of a positive number. In fp32 the sum is
kept as the sum of two floats, so that a difference keeps its digits however far the sum has fallen; a boundary between
documents is a mask.

Legend: B batch, L length, H heads, G groups of heads, P channels of a head, N states per channel; T tokens of a
block, K chunks of it, Q tokens of a chunk (a second one is called J), R heads of a group, M = B G K.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# A logarithm of a decay far enough under zero for its exponential to be 0 in any dtype.
_FORGET = -800.0

# Bounds of a chunk's tokens, and how many numbers of one intermediate result a block may have. Work within chunks grows
# with their length, work between them shrinks with it: they meet near the root of P N.
_CHUNK = {"cpu": (16, 64), "cuda": (64, 128)}
_BLOCK_NUMEL = {"cpu": 1 << 20, "cuda": 1 << 26}


class Plan(NamedTuple):
    """How a scan is cut: B, G, tokens per chunk and per block, and the dtypes of the products and of all else."""

    batch: int
    num_groups: int
    chunk: int
    block: int
    low: torch.dtype
    dtype: torch.dtype

    def grouped(self, tensor_M: Tensor) -> Tensor:
        """[M, ...] as [B, G, K, ...]."""
        return tensor_M.unflatten(0, (self.batch, self.num_groups, -1))

    def spans(self, length: int) -> list[slice]:
        """The blocks, as slices of time, in order."""
        return [slice(t, min(t + self.block, length)) for t in range(0, length, self.block)]


def plan_scan(x_BLGP: Tensor, C_BLHN: Tensor) -> Plan:
    """Plan how to cut a scan of these inputs."""
    batch, length, num_groups, width = x_BLGP.shape
    num_heads, num_states = C_BLHN.shape[2:]
    device = x_BLGP.device.type
    shortest, longest = _CHUNK.get(device, _CHUNK["cuda"])
    chunk = min(max(shortest, min(math.isqrt(width * num_states), longest)), length)
    numel = batch * num_heads * max(chunk * chunk, chunk * max(width, num_states), width * num_states)
    num_chunks = max(1, _BLOCK_NUMEL.get(device, _BLOCK_NUMEL["cuda"]) // numel)
    dtype = torch.promote_types(x_BLGP.dtype, torch.float32)
    low = torch.bfloat16 if device == "cuda" and x_BLGP.dtype == torch.bfloat16 else dtype
    return Plan(batch, num_groups, chunk, min(num_chunks, -(-length // chunk)) * chunk, low, dtype)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of batches of matrices, with sums and result in `dtype`."""
    if left.dtype == dtype:
        return torch.bmm(left, right)
    return torch.bmm(left, right, out_dtype=dtype)


def rounded_product(tensor: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """The elements' products, computed in fp32 at least and rounded once, to the dtype of the matrix products."""
    shape = torch.broadcast_shapes(tensor.shape, weight.shape)
    return torch.mul(tensor, weight, out=torch.empty(shape, dtype=plan.low, device=tensor.device))


def _laid_out(view: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy without gaps, in `dtype`, in one pass."""
    return torch.empty(view.shape, dtype=dtype, device=view.device).copy_(view)


def _cut(tensor_BT: Tensor, plan: Plan) -> Tensor:
    """[B, T, ...] as [B, K, Q, ...], with zeros behind the end."""
    missing = -tensor_BT.shape[1] % plan.chunk
    if missing:
        tensor_BT = pad(tensor_BT, (0, 0) * (tensor_BT.ndim - 2) + (0, missing))
    return tensor_BT.unflatten(1, (-1, plan.chunk))


def cut_heads(tensor_BTH: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] as [M, R, Q, ...]."""
    tensor = _cut(tensor_BTH, plan).unflatten(3, (plan.num_groups, -1))
    order = (0, 3, 1, 4, 2, *range(5, tensor.ndim))
    return _laid_out(tensor.permute(order), dtype).flatten(0, 2)


def join_heads_(out_BTH: Tensor, tensor_MRQ: Tensor, plan: Plan) -> None:
    """Write [M, R, Q, ...] into [B, T, H, ...], without what was padded."""
    tensor = plan.grouped(tensor_MRQ)
    order = (0, 2, 4, 1, 3, *range(5, tensor.ndim))
    heads, length = (plan.num_groups, tensor.shape[3]), out_BTH.shape[1]
    whole = length - length % plan.chunk
    chunks = tensor.permute(order)
    out = out_BTH.unflatten(2, heads)
    if whole:
        out[:, :whole].unflatten(1, (-1, plan.chunk)).copy_(chunks[:, : whole // plan.chunk])
    if whole < length:
        out[:, whole:].copy_(chunks[:, -1, : length - whole])


class Decays(NamedTuple):
    """Products of decays: between two tokens of a chunk, from its start to a token, from a token to its end, over it.

    Zero where a document starts in between, and between a token and a later one.
    """

    between: Tensor  # [M, R, Q, J]
    until: Tensor  # [M, R, Q]
    after: Tensor  # [M, R, Q]
    over: Tensor  # [M, R]


def _decays(log_MRQ: Tensor, starts_BKQ: Tensor | None, plan: Plan) -> Decays:
    sum_MRQ = log_MRQ.double().cumsum(dim=-1)
    until_MRQ = sum_MRQ.exp().to(plan.dtype)
    after_MRQ = (sum_MRQ[..., -1:] - sum_MRQ).exp_().to(plan.dtype)
    high_MRQ = sum_MRQ.to(plan.dtype)
    between_MRQJ = high_MRQ.unsqueeze(-1) - high_MRQ.unsqueeze(-2)
    if plan.low == torch.float32:  # bf16 products would not see the digits, fp64 has enough
        low_MRQ = (sum_MRQ - high_MRQ).to(plan.dtype)
        between_MRQJ.add_(low_MRQ.unsqueeze(-1)).sub_(low_MRQ.unsqueeze(-2))
    hidden = torch.ones(2 * log_MRQ.shape[-1:], dtype=torch.bool, device=log_MRQ.device).triu_(1)
    if starts_BKQ is not None:
        document_BKQ = starts_BKQ.cumsum(dim=-1)
        hidden = hidden | (document_BKQ.unsqueeze(-1) != document_BKQ.unsqueeze(-2))
        hidden = hidden[:, None, :, None]
        for decays, gone_BKQ in (
            (until_MRQ, document_BKQ > 0),
            (after_MRQ, document_BKQ != document_BKQ[..., -1:]),
        ):
            plan.grouped(decays).masked_fill_(gone_BKQ[:, None, :, None], 0.0)
    plan.grouped(between_MRQJ).masked_fill_(hidden, -torch.inf)
    return Decays(between_MRQJ.exp_(), until_MRQ, after_MRQ, until_MRQ[..., -1])


class Block(NamedTuple):
    """A block's inputs, cut into chunks and padded with tokens of step size 0, which change nothing."""

    x: Tensor  # [M, P, Q]
    B: Tensor  # [M, Q, N]
    C: Tensor  # [M, R, Q, N]
    delta: Tensor  # [M, R, Q]
    decays: Decays


class Inputs(NamedTuple):
    """What is scanned: the op's arguments, but the step sizes are final."""

    x: Tensor  # [B, L, G, P]
    delta: Tensor  # [B, L, H]
    A: Tensor  # [H]
    B: Tensor  # [B, L, G, N]
    C: Tensor  # [B, L, H, N]
    D: Tensor | None  # [H]
    starts: Tensor | None  # [B, L]


def cut_block(inputs: Inputs, span: slice, plan: Plan) -> Block:
    """Lay a span of time out in chunks, with its decays."""
    x_MPQ = _laid_out(_cut(inputs.x[:, span], plan).permute(0, 3, 1, 4, 2), plan.low).flatten(0, 2)
    B_MQN = _laid_out(_cut(inputs.B[:, span], plan).permute(0, 3, 1, 2, 4), plan.low).flatten(0, 2)
    C_MRQN = cut_heads(inputs.C[:, span], plan, plan.low)
    delta_BTH = inputs.delta[:, span]
    delta_MRQ = cut_heads(delta_BTH, plan, plan.dtype)
    log_MRQ = cut_heads((delta_BTH * inputs.A).clamp_(min=_FORGET), plan, plan.dtype)
    starts_BKQ = None if inputs.starts is None else _cut(inputs.starts[:, span], plan)
    return Block(x_MPQ, B_MQN, C_MRQN, delta_MRQ, _decays(log_MRQ, starts_BKQ, plan))

"""Pools of states: many sequences' states in one tensor, a slot each, for steps that update them where they lie.

A step says by `slot_B` in which slot each of its sequences has its state; slots need not be in order nor all be used,
and lie as far apart as the pool's first stride says. Rows of a step that stand for no sequence, as a CUDA graph of
fixed size has them, name the null slot: nothing is read from it or written to it, and their outputs are zero. No two
other rows may name the same slot.

Legend: M slots of a pool, B sequences of a step; the other axes are those of what is pooled.
"""

import torch
from torch import Tensor


def check_pool(
    name: str, pool_M: Tensor, row_shape: tuple[int, ...], slot_B: Tensor | None, num_rows: int, null_slot: int | None
) -> None:
    """Check a pool and the slots of a step's rows.

    Args:
        name: of the pool, for the error.
        pool_M: [M, *row_shape].
        row_shape: of one sequence's state.
        slot_B: the slots; None: row b has slot b.
        num_rows: B.
        null_slot: the slot that stands for no sequence, if there is one.

    Raises:
        ValueError: something does not fit; names the argument, its value and the remedy.
    """
    if tuple(pool_M.shape[1:]) != row_shape or not pool_M.is_floating_point():
        got = f"{pool_M.dtype} of shape {tuple(pool_M.shape)}"
        raise ValueError(f"{name}: {got}; pass floats of shape [slots, {', '.join(map(str, row_shape))}]")
    if not pool_M[:1].is_contiguous():
        raise ValueError(f"{name}: strides {pool_M.stride()}; each slot must be contiguous, however far they lie apart")
    if slot_B is None:
        if pool_M.shape[0] < num_rows or null_slot is not None:
            raise ValueError(
                f"slot_B: None with {pool_M.shape[0]} slots for {num_rows} rows and null_slot {null_slot}; pass the "
                "rows' slots, or a slot per row and no null slot"
            )
        return
    if slot_B.dtype not in (torch.int32, torch.int64) or tuple(slot_B.shape) != (num_rows,):
        got = f"{slot_B.dtype} of shape {tuple(slot_B.shape)}"
        raise ValueError(f"slot_B: {got}; pass int32 or int64 of shape [{num_rows}]")
    # Kernels write nothing for -1, indexing would write to the last slot; a GPU would have to be waited for.
    if slot_B.device.type == "cpu" and bool((slot_B < 0).any()):
        raise ValueError(
            f"slot_B: {int(slot_B.min())}; pass slots of the pool, and null_slot where there is no sequence"
        )
    if null_slot is not None and not 0 <= null_slot < pool_M.shape[0]:
        raise ValueError(f"null_slot: {null_slot}; pass one of the pool's slots, 0..{pool_M.shape[0] - 1}, or None")


def read_slots(pool_M: Tensor, slot_B: Tensor | None, num_rows: int) -> Tensor:
    """The rows' states, gathered."""
    return pool_M[:num_rows] if slot_B is None else pool_M[slot_B.long()]


def write_slots(pool_M: Tensor, slot_B: Tensor | None, new_B: Tensor, null_slot: int | None) -> None:
    """Write the rows' new states to their slots, in the pool's dtype; the null slot stays as it is."""
    if slot_B is None:
        pool_M[: new_B.shape[0]] = new_B.to(pool_M.dtype)
        return
    slot_B = slot_B.long()
    new_B = new_B.to(pool_M.dtype)
    # A CPU can look whether there are null rows; a GPU would have to be waited for.
    if null_slot is not None and (slot_B.device.type != "cpu" or bool((slot_B == null_slot).any())):
        # All null rows write what is there already.
        new_B = torch.where(_over(slot_B != null_slot, new_B), new_B, pool_M[null_slot])
    pool_M[slot_B] = new_B


def zero_null_rows(out_B: Tensor, slot_B: Tensor | None, null_slot: int | None) -> Tensor:
    """The outputs, zero for the rows that stand for no sequence, whatever was in the null slot."""
    if slot_B is None or null_slot is None:
        return out_B
    return torch.where(_over(slot_B != null_slot, out_B), out_B, 0.0)


def _over(mask_B: Tensor, tensor_B: Tensor) -> Tensor:
    return mask_B.view(-1, *[1] * (tensor_B.ndim - 1))

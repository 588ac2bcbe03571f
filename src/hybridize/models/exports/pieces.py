"""Tensors of an export as expressions: planned on shapes alone, made one at a time.

An expression is a function that is given a reader of the hybrid's tensors by name and returns one tensor. Planning runs
it on tensors without data, which gives its shape and dtype and tells which of the hybrid's tensors it reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridize.models.stored import StoredTensors

Read = Callable[[str], Tensor]
Make = Callable[[Read], Tensor]


@dataclass
class Pieces:
    """The tensors to be written, by name, and what has been read to make them.

    Attributes:
        stored: the hybrid's.
        makes: the expression of each tensor to be written.
        metas: its shape and dtype.
        used: names of the hybrid's tensors that some expression reads.
    """

    stored: StoredTensors
    makes: dict[str, Make] = field(default_factory=dict)
    metas: dict[str, Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def add(self, name: str, make: Make) -> None:
        """Plan one tensor."""
        self.makes[name] = make
        self.metas[name] = make(self._read_meta)

    def keep(self, name: str, source: str | None = None) -> None:
        """Plan a tensor that keeps its bits, under the same name or another."""
        self.change(name, source or name, lambda tensor: tensor)

    def change(self, name: str, source: str, change: Callable[[Tensor], Tensor]) -> None:
        """Plan a tensor that is made of one of the hybrid's."""
        self.add(name, lambda read: change(read(source)))

    def make(self, name: str) -> Tensor:
        """Make a planned tensor."""
        return self.makes[name](self.stored.copy).contiguous()

    def has(self, name: str) -> bool:
        """Whether the hybrid has a tensor of this name."""
        return name in self.stored.metas

    def _read_meta(self, name: str) -> Tensor:
        self.used.add(name)
        return self.stored.metas[name]


def place_blocks(tensor: Tensor, blocks: Sequence[int | None], width: int, dim: int = 0) -> Tensor:
    """Blocks of rows or columns, such as heads, in another order: some more than once, zeros for those that are None.

    Args:
        tensor: with blocks along `dim`.
        blocks: which of the tensor's blocks stands at each place.
        width: entries of a block along `dim`.
        dim: where the blocks lie.
    """
    if list(blocks) == list(range(tensor.shape[dim] // width)):
        return tensor
    index = torch.tensor([block or 0 for block in blocks], device=tensor.device)
    empty = torch.tensor([block is None for block in blocks], device=tensor.device)
    placed = tensor.unflatten(dim, (-1, width)).index_select(dim, index)
    return placed.masked_fill(empty.view(-1, *[1] * (placed.ndim - dim - 1)), 0).flatten(dim, dim + 1)


def scaled(tensor: Tensor, factors: Tensor, place: str) -> Tensor:
    """A tensor times powers of two, exactly.

    Args:
        tensor: any floating dtype.
        factors: broadcast against the tensor.
        place: what to call the tensor in the error.

    Raises:
        ValueError: an entry is too large or too small for its dtype to be scaled without rounding.
    """
    if tensor.is_meta or bool(factors.eq(1).all()):
        return tensor
    own_factors = factors.to(tensor.dtype)
    product = tensor * own_factors
    if not torch.equal(product / own_factors, tensor):
        raise ValueError(
            f"{place}: it holds numbers that are too large or too small for {tensor.dtype} to be scaled by a power of "
            "two, or NaN; serve the hybrid as it is, with the plugin"
        )
    return product


def check_used(pieces: Pieces) -> None:
    """Check that every tensor of the hybrid has gone into some tensor to be written.

    Raises:
        ValueError: one is left over.
    """
    if left := sorted(pieces.stored.metas.keys() - pieces.used):
        raise ValueError(
            f"{pieces.stored.folder}: {len(left)} tensors have no place in the format, {left[0]} among them; "
            "serve the hybrid as it is, with the plugin"
        )

"""Expressions for a student's tensor: what it is made of, before anything is made.

An expression reads like the end of a sentence ("rows of q_proj.weight, ...") and evaluates to a tensor. The
leaves are `Take`, a teacher's tensor with its rows or columns in some order, and `Fresh`, the mixer's own
initialisation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Take:
    """A teacher's tensor, as it lies or with its rows (`dim` 0) or columns (`dim` 1) in another order.

    Attributes:
        source: full name of the teacher's tensor.
        order: for each row or column of the result, the one of the source it is; None for as it lies.
        dim: the dimension that `order` indexes.
        why: the order in words.
    """

    source: str
    order: tuple[int, ...] | None = None
    dim: int = 0
    why: str = ""

    def evaluate(self, sources: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Tensor:
        """Make the tensor; it shares no memory with the source."""
        tensor = sources[self.source]
        if self.order is None:
            return tensor.clone()
        return tensor.index_select(self.dim, torch.tensor(self.order, device=tensor.device))

    def reorder(self, order: tuple[int, ...] | None, why: str) -> "Take":
        """The same rows or columns in yet another order, by their number in this one; None for as they lie."""
        if order is None:
            return self
        if self.order is None:
            return Take(self.source, order, self.dim, why)
        return Take(self.source, tuple(self.order[i] for i in order), self.dim, f"{self.why}, {why}")

    def leaves(self) -> Iterator["Take | Fresh"]:
        """The expression itself."""
        yield self

    def __str__(self) -> str:
        """E.g. `q_proj.weight, as it lies`."""
        if self.order is None:
            return f"{self.source}, as it lies"
        return f"the {('rows', 'columns')[self.dim]} of {self.source}, {self.why}"


@dataclass(frozen=True)
class Fresh:
    """A part of the mixer's own initialisation.

    Attributes:
        target: name of the tensor within the mixer.
        how: the initialisation in words, e.g. `log(1..16) in every channel`.
        rows: first and last + 1 of the rows meant; None for all of them.
    """

    target: str
    how: str
    rows: tuple[int, int] | None = None

    def evaluate(self, sources: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Tensor:
        """Take the rows out of the freshly initialised mixer's tensor."""
        tensor = fresh[self.target]
        return tensor if self.rows is None else tensor[slice(*self.rows)]

    def leaves(self) -> Iterator["Take | Fresh"]:
        """The expression itself."""
        yield self

    def __str__(self) -> str:
        """E.g. `init: 1`."""
        return f"init: {self.how}"


@dataclass(frozen=True)
class Stack:
    """Parts one below the other, each with a label, e.g. in_proj's z | x | B | C.

    Attributes:
        parts: label, number of rows and expression of each part.
    """

    parts: tuple[tuple[str, int, Take | Fresh], ...]

    def evaluate(self, sources: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the parts' rows, in the dtype and on the device of what comes from the teacher."""
        tensors = [expression.evaluate(sources, fresh) for _, _, expression in self.parts]
        taken = [tensor for tensor, (_, _, part) in zip(tensors, self.parts, strict=True) if isinstance(part, Take)]
        like = (taken or tensors)[0]
        return torch.cat([tensor.to(like) for tensor in tensors])

    def leaves(self) -> Iterator[Take | Fresh]:
        """Every part's expression."""
        for _, _, expression in self.parts:
            yield expression

    def __str__(self) -> str:
        """E.g. `rows 0..63 (z) init: normal(0, 0.02); rows 64..95 (x) v_proj.weight, as it lies`."""
        lines, first = [], 0
        for label, num_rows, expression in self.parts:
            lines.append(f"rows {first}..{first + num_rows - 1} ({label}) {expression}")
            first += num_rows
        return "; ".join(lines)


Expression = Take | Fresh | Stack

"""Expressions for a student's tensor: what it is made of, before anything is made.

An expression reads like the end of a sentence ("rows of q_proj.weight, ...") and evaluates to a tensor. The
leaves are `Take`, a teacher's tensor with its rows or columns in some order, `Fresh`, the mixer's own
initialisation, and `Constant`. `Stack` puts them below one another, `Blend` adds them up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Take:
    """A teacher's tensor, as it lies or with its rows (`dim` 0) or columns (`dim` 1) in another order.

    Attributes:
        source: full name of the teacher's tensor.
        order: for each row or column of the result, the one of the source it is; None for as it lies. One may be
            taken several times, or not at all.
        dim: the dimension that `order` indexes.
        why: the order in words.
        transposed: whether rows and columns change places after that.
    """

    source: str
    order: tuple[int, ...] | None = None
    dim: int = 0
    why: str = ""
    transposed: bool = False

    def evaluate(self, sources: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Tensor:
        """Make the tensor; it shares no memory with the source."""
        tensor = sources[self.source]
        if self.order is not None:
            tensor = tensor.index_select(self.dim, torch.tensor(self.order, device=tensor.device))
        else:
            tensor = tensor.clone()
        return tensor.t().contiguous() if self.transposed else tensor

    def reorder(self, order: tuple[int, ...] | None, why: str) -> "Take":
        """The same rows or columns in yet another order, by their number in this one; None for as they lie."""
        assert not self.transposed
        if order is None:
            return self
        if self.order is None:
            return Take(self.source, order, self.dim, why)
        words = f"{self.why}, {why}" if why else self.why
        return Take(self.source, tuple(self.order[i] for i in order), self.dim, words)

    def leaves(self) -> Iterator["Leaf"]:
        """The expression itself."""
        yield self

    def __str__(self) -> str:
        """E.g. `q_proj.weight, as it lies`."""
        what = f"{self.source}, as it lies"
        if self.order is not None:
            what = f"the {('rows', 'columns')[self.dim]} of {self.source}, {self.why}"
        return f"{what}, transposed" if self.transposed else what


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

    def leaves(self) -> Iterator["Leaf"]:
        """The expression itself."""
        yield self

    def __str__(self) -> str:
        """E.g. `init: 1`."""
        return f"init: {self.how}"


@dataclass(frozen=True)
class Constant:
    """Numbers that neither the teacher nor chance has a say in.

    Attributes:
        values: one for all of the tensor, or one for each of its rows (its first dimension).
        shape: of the tensor.
        how: what they are, in words, e.g. `0, a gate that is the same for every token`.
        newest: whether the numbers stand in the last column only, with 0 elsewhere: a convolution's newest tap.
    """

    values: float | tuple[float, ...] = field(repr=False)
    shape: tuple[int, ...]
    how: str
    newest: bool = False

    def evaluate(self, sources: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Tensor:
        """Make the tensor, in fp32 on the CPU."""
        values = torch.tensor(self.values)
        if values.ndim:
            values = values.view(-1, *[1] * (len(self.shape) - 1))
        tensor = torch.zeros(self.shape)
        part = tensor[..., -1:] if self.newest else tensor
        part.copy_(values.expand_as(part))
        return tensor

    def leaves(self) -> Iterator["Leaf"]:
        """The expression itself."""
        yield self

    def __str__(self) -> str:
        """E.g. `set: 0`."""
        return f"set: {self.how}"


@dataclass(frozen=True)
class Stack:
    """Parts one below the other, each with a label, e.g. in_proj's z | x | B | C.

    Attributes:
        parts: label, number of rows and expression of each part.
    """

    parts: "tuple[tuple[str, int, Expression], ...]"

    def evaluate(self, sources: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the parts' rows, in the dtype and on the device of what comes from the teacher."""
        expressions = [expression for _, _, expression in self.parts]
        tensors = [expression.evaluate(sources, fresh) for expression in expressions]
        like = _teachers(expressions, tensors)
        return torch.cat([tensor.to(like) for tensor in tensors])

    def leaves(self) -> Iterator["Leaf"]:
        """Every part's leaves."""
        for _, _, expression in self.parts:
            yield from expression.leaves()

    def __str__(self) -> str:
        """E.g. `rows 0..63 (z) init: normal(0, 0.02); rows 64..95 (x) v_proj.weight, as it lies`."""
        lines, first = [], 0
        for label, num_rows, expression in self.parts:
            lines.append(f"rows {first}..{first + num_rows - 1} ({label}) {expression}")
            first += num_rows
        return "; ".join(lines)


@dataclass(frozen=True)
class Blend:
    """A weighted sum of expressions of one shape.

    Attributes:
        parts: weight and expression of each part.
    """

    parts: "tuple[tuple[float, Expression], ...]"

    def evaluate(self, sources: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Tensor:
        """Sum in fp32 at least; the result has the dtype and the device of what comes from the teacher."""
        expressions = [expression for _, expression in self.parts]
        tensors = [expression.evaluate(sources, fresh) for expression in expressions]
        like = _teachers(expressions, tensors)
        exact = torch.promote_types(like.dtype, torch.float32)
        total = torch.zeros(tensors[0].shape, dtype=exact, device=like.device)
        for (weight, _), tensor in zip(self.parts, tensors, strict=True):
            total = total + weight * tensor.to(device=like.device, dtype=exact)
        return total.to(like.dtype)

    def leaves(self) -> Iterator["Leaf"]:
        """Every part's leaves."""
        for _, expression in self.parts:
            yield from expression.leaves()

    def __str__(self) -> str:
        """E.g. `0.5 times (o_proj.weight, as it lies, transposed) plus 0.5 times (...)`."""
        return " plus ".join(
            f"({expression})" if weight == 1 else f"{weight:g} times ({expression})"
            for weight, expression in self.parts
        )


Leaf = Take | Fresh | Constant
Expression = Leaf | Stack | Blend


def _teachers(expressions: list[Expression], tensors: list[Tensor]) -> Tensor:
    """The first tensor that the teacher has a part in; else the first."""
    for expression, tensor in zip(expressions, tensors, strict=True):
        if any(isinstance(leaf, Take) for leaf in expression.leaves()):
            return tensor
    return tensors[0]

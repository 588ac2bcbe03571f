"""How the prompts of one step are laid out for the mixers, which take rectangles of tokens.

A sequence that goes on from a state is taken by itself. Fresh ones of nearly the same length are taken together, padded
on the left; so many short prompts cost few calls, and little of the work is padding. The plan is made once a step, from
lengths that the host knows, and shared by all layers. Imports no vllm.

Legend: S sequences of a group, L length of its longest one, T tokens of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# At most this many slots per token in a group of several sequences.
_MOST_SLOTS_PER_TOKEN = 1.25


@dataclass(frozen=True)
class PrefillGroup:
    """Sequences of one step that a mixer takes together.

    Attributes:
        sequences: which of the step's prompts they are.
        fresh: whether they start here; else there is one, and it goes on from its state.
        tokens: where the tokens lie among those of all prompts, if there is but one sequence.
        slots: the slots of the rectangle, row by row, that hold tokens; None: one sequence.
        token_index: the tokens that they hold.
        valid: where the rectangle has tokens; None: everywhere.
    """

    sequences: Tensor
    fresh: bool
    tokens: slice
    slots: Tensor | None = None
    token_index: Tensor | None = None
    valid: Tensor | None = None

    def gather(self, hidden_TE: Tensor) -> Tensor:
        """The group's tokens as a rectangle, [S, L, E], of all prompts' tokens."""
        if self.slots is None:
            return hidden_TE[self.tokens].unsqueeze(0)
        num_sequences = self.sequences.shape[0]
        if self.valid is None:
            return hidden_TE[self.token_index].unflatten(0, (num_sequences, -1))
        rectangle = hidden_TE.new_zeros(self.valid.numel(), hidden_TE.shape[-1])
        rectangle[self.slots] = hidden_TE[self.token_index]
        return rectangle.unflatten(0, (num_sequences, -1))

    def scatter(self, out_SLE: Tensor, output_TE: Tensor) -> None:
        """Write a rectangle of results to where its tokens lie among those of all prompts."""
        if self.slots is None:
            output_TE[self.tokens] = out_SLE[0]
        else:
            output_TE[self.token_index] = out_SLE.flatten(0, 1)[self.slots]


def plan_prefill(lengths: Sequence[int], fresh: Sequence[bool], device: torch.device | str) -> list[PrefillGroup]:
    """Divide the prompts of one step into groups.

    Args:
        lengths: tokens of each prompt in this step, in the order in which they lie behind one another.
        fresh: whether each starts here, or goes on from a state.
        device: of the indices.
    """
    firsts = [0]
    for length in lengths:
        firsts.append(firsts[-1] + length)
    return [_group(members, firsts, fresh[members[0]], device) for members in _divide(lengths, fresh)]


def _divide(lengths: Sequence[int], fresh: Sequence[bool]) -> list[list[int]]:
    groups = [[sequence] for sequence in range(len(lengths)) if not fresh[sequence]]
    current: list[int] = []
    num_tokens = 0
    for sequence in sorted((s for s in range(len(lengths)) if fresh[s]), key=lambda s: (-lengths[s], s)):
        num_slots = lengths[current[0]] * (len(current) + 1) if current else 0
        if not current or num_slots > _MOST_SLOTS_PER_TOKEN * (num_tokens + lengths[sequence]):
            current, num_tokens = [], 0
            groups.append(current)
        current.append(sequence)
        num_tokens += lengths[sequence]
    return groups


def _group(members: list[int], firsts: list[int], fresh: bool, device: torch.device | str) -> PrefillGroup:
    tokens = slice(firsts[members[0]], firsts[members[0] + 1])
    sequences = torch.tensor(members, device=device)
    if len(members) == 1:
        return PrefillGroup(sequences, fresh, tokens)
    lengths = [firsts[member + 1] - firsts[member] for member in members]
    longest = max(lengths)
    starts = [longest * (row + 1) - length for row, length in enumerate(lengths)]
    slots = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    token_index = torch.cat([torch.arange(firsts[member], firsts[member + 1]) for member in members])
    valid = None
    if min(lengths) < longest:
        valid = torch.zeros(len(members) * longest, dtype=torch.bool)
        valid[slots] = True
        valid = valid.unflatten(0, (len(members), longest)).to(device)
    return PrefillGroup(sequences, fresh, tokens, slots.to(device), token_index.to(device), valid)

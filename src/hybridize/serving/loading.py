"""Loading a hybrid's checkpoint, each of its tensors accounted for. Imports no vllm.

Tensors of the mixers go where the checkpoint's names say; all others go the way that vLLM has for the family. A tensor
of a replaced layer that nobody knows, that has another shape, or that is missing, is an error: no layer is ever served
with what happened to be in its memory. vLLM by itself does not notice if a matrix of the teacher's is missing, or if it
has no place for a bias; so that is checked here too.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hybridize.serving.shards import Rule, take_part


@dataclass(frozen=True)
class Target:
    """Where a tensor of the checkpoint goes.

    Attributes:
        parameter: what this rank has of it.
        rule: which part that is; None: all.
    """

    parameter: nn.Parameter
    rule: Rule | None


class HybridWeights:
    """Takes the tensors of a hybrid's own layers out of a checkpoint's stream.

    Args:
        targets: the parameters to fill, by the tensors' names in the checkpoint.
        closed: the prefixes below which every tensor of the checkpoint must be a target.
        elsewhere: the prefixes of replaced layers that other pipeline stages have.
        rank: of this process among those that share the mixers.
        num_ranks: how many there are.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        closed: Iterable[str],
        elsewhere: Iterable[str],
        rank: int,
        num_ranks: int,
    ) -> None:
        self.targets = targets
        self.closed, self.elsewhere = tuple(closed), tuple(elsewhere)
        self.rank, self.num_ranks = rank, num_ranks
        self.loaded: set[str] = set()
        self.seen: dict[str, int] = {}

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Fill the targets from a stream of tensors and pass on what belongs to the rest of the model.

        Raises:
            ValueError: a tensor belongs to no part of its layer, or has another shape; names it and the remedy.
        """
        for name, tensor in weights:
            self.seen[name] = tensor.numel()
            if name in self.targets:
                self._fill(name, tensor)
            elif name.startswith(self.closed):
                raise ValueError(
                    f"{name}: the checkpoint has this tensor, but the layer's mixer, as config.json describes it, has "
                    "none of that name; convert the model again"
                )
            elif not name.startswith(self.elsewhere):
                yield name, tensor

    def check_complete(self, expected: Mapping[str, int]) -> None:
        """Check that the stream had all that the model consists of.

        Args:
            expected: the number of entries of each of the model's tensors, by name. Where a checkpoint has them by
                other names, such as a mixture's experts one by one, a layer's entries are counted.

        Raises:
            ValueError: a tensor is missing; names it.
        """
        missing = sorted(self.targets.keys() - self.loaded)
        other_names = {name: count for name, count in self.seen.items() if name not in expected}
        absent = {name: count for name, count in expected.items() if name not in self.seen}
        found = _by_layer(other_names)
        for layer, count in _by_layer(absent).items():
            if count > found.get(layer, 0):
                missing += [name for name in absent if _layer(name) == layer and name not in missing]
        if missing:
            some = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise ValueError(f"the checkpoint lacks tensors that the model needs: {some}; convert the model again")

    def _fill(self, name: str, tensor: Tensor) -> None:
        target = self.targets[name]
        try:
            part = take_part(tensor, target.rule, self.rank, self.num_ranks)
        except ValueError as error:
            raise ValueError(f"{name}: the checkpoint's tensor has {error}; convert the model again") from None
        if part.shape != target.parameter.shape:
            raise ValueError(
                f"{name}: the checkpoint's tensor has shape {tuple(tensor.shape)}, of which this rank has "
                f"{tuple(part.shape)}, but by config.json it should be {tuple(target.parameter.shape)}; convert the "
                "model again"
            )
        target.parameter.data.copy_(part)
        self.loaded.add(name)


def _layer(name: str) -> str:
    """The part of a tensor's name that says its layer, or the name."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name


def _by_layer(counts: Mapping[str, int]) -> dict[str, int]:
    summed: dict[str, int] = {}
    for name, count in counts.items():
        summed[_layer(name)] = summed.get(_layer(name), 0) + count
    return summed


def without_lost_biases(
    weights: Iterable[tuple[str, Tensor]], parameters: Collection[str], packed: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Tensor]]:
    """Pass a stream of tensors on, but not a bias that vLLM's model has no place for and would leave out unsaid.

    Args:
        weights: the checkpoint's tensors.
        parameters: names of the model's parameters.
        packed: which projections of the checkpoint vLLM keeps in one, by the name of the one.

    Raises:
        ValueError: there is such a bias; names it.
    """
    whole = {part: name for name, parts in packed.items() for part in parts}
    for name, tensor in weights:
        if name.endswith(".bias"):
            path, _, module = name.removesuffix(".bias").rpartition(".")
            if f"{path}.{whole.get(module, module)}.bias" not in parameters:
                raise ValueError(
                    f"{name}: vLLM's model of this family has no such bias and would leave it out, so its answers "
                    "would not be the model's; generate with transformers"
                )
        yield name, tensor

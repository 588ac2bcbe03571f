"""How vLLM cuts a model's layers into groups of its cache (releases 0.26 to 0.32); each costs work at every step."""

from collections.abc import Mapping
from typing import TypeVar

Kind = TypeVar("Kind")


def group_layers(layers: Mapping[Kind, int]) -> tuple[int, dict[Kind, int]]:
    """Cut the layers of each kind into groups of one size.

    That is the number of layers of the smallest kind, or of the largest where that is less than half as large again.

    Args:
        layers: how many layers are of each kind; attention, windows of one length and mixers with a state are kinds.

    Returns:
        Layers of a group, and the number of groups of each kind; 0 and none for no layers.
    """
    present = {kind: count for kind, count in layers.items() if count}
    if not present:
        return 0, {}
    fewest, most = min(present.values()), max(present.values())
    size = most if most < 1.5 * fewest else fewest
    return size, {kind: -(-count // size) for kind, count in present.items()}

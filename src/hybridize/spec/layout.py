"""A layout: which mixer each layer of the hybrid has."""

from collections.abc import Iterable, Sequence
from typing import Self

from pydantic import Field

from hybridize.spec.base import Spec
from hybridize.spec.mixers import AttentionGeometry, AttentionSpec, Mamba1Spec, MixerSpec


class LayoutSpec(Spec):
    """One mixer spec per layer, from the bottom up."""

    layers: tuple[MixerSpec, ...] = Field(min_length=1)

    @classmethod
    def replace(
        cls,
        num_layers: int,
        replaced: Iterable[int],
        mixer: AttentionSpec | Mamba1Spec,
        place: str = "layers",
    ) -> Self:
        """Attention everywhere, but `mixer` in the layers named by `replaced` (0-based).

        Raises:
            ValueError: a layer is named that the teacher does not have, or one is named twice.
        """
        return cls(layers=(AttentionSpec(),) * num_layers).with_replaced(replaced, mixer, place)

    def with_replaced(self, replaced: Iterable[int], mixer: AttentionSpec | Mamba1Spec, place: str = "layers") -> Self:
        """This layout with `mixer` in further layers (0-based) that are attention still.

        Raises:
            ValueError: a layer is named that there is not, is named twice, or is a mixer already.
        """
        chosen = list(replaced)
        check_layers(chosen, len(self.layers), place)
        for position, layer in enumerate(chosen):
            if not isinstance(self.layers[layer], AttentionSpec):
                raise ValueError(
                    f"{place}[{position}]: layer {layer} is {self.layers[layer].type} already; name one that is "
                    "attention still"
                )
        return type(self)(layers=tuple(mixer if i in set(chosen) else old for i, old in enumerate(self.layers)))

    @property
    def replaced(self) -> tuple[int, ...]:
        """The layers that are not attention, ascending."""
        return tuple(i for i, mixer in enumerate(self.layers) if not isinstance(mixer, AttentionSpec))

    def resolve(self, geometry: AttentionGeometry) -> Self:
        """Return the layout with every mixer's sizes filled in from the teacher's attention geometry."""
        return type(self)(layers=tuple(mixer.resolve(geometry) for mixer in self.layers))

    def __str__(self) -> str:
        """One letter a layer, e.g. `aammaaaa`: the first letter of each mixer's name."""
        return "".join(mixer.type[0] for mixer in self.layers)


def check_layers(layers: Sequence[int], num_layers: int, place: str = "layers") -> None:
    """Raise a `ValueError` if a layer is out of range or named twice."""
    seen: set[int] = set()
    for position, layer in enumerate(layers):
        if not 0 <= layer < num_layers:
            raise ValueError(
                f"{place}[{position}]: the teacher has no layer {layer}; it has {num_layers}, use 0..{num_layers - 1}"
            )
        if layer in seen:
            raise ValueError(f"{place}[{position}]: layer {layer} is named twice; name each layer once")
        seen.add(layer)

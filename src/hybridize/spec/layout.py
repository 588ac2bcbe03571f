"""A layout: which mixer each layer of the hybrid has."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

from pydantic import Field

from hybridize.spec.base import Spec
from hybridize.spec.mixers import MIXER_TYPES, AttentionGeometry, AttentionSpec, MixerSpec


class LayoutSpec(Spec):
    """One mixer spec per layer, from the bottom up."""

    layers: tuple[MixerSpec, ...] = Field(min_length=1)

    @classmethod
    def replace(
        cls,
        num_layers: int,
        replaced: Iterable[int],
        mixer: MixerSpec,
        place: str = "layers",
    ) -> Self:
        """Attention everywhere, but `mixer` in the layers named by `replaced` (0-based).

        Raises:
            ValueError: a layer is named that the teacher does not have, or one is named twice.
        """
        return cls(layers=(AttentionSpec(),) * num_layers).with_replaced(replaced, mixer, place)

    @classmethod
    def read(cls, word: str, blocks: Mapping[str, MixerSpec] | None = None, place: str = "layout") -> Self:
        """Read a layout that is written as one letter per layer, e.g. `aammgaaa`.

        Args:
            word: the letters.
            blocks: mixers by the letter that stands for them; by default a letter stands for its kind's default.
            place: what to call the layout in errors.

        Raises:
            ValueError: a letter stands for nothing, or a block is called by more than one letter or by none.
        """
        known: dict[str, MixerSpec] = {kind.letter: kind() for kind in MIXER_TYPES.values()}
        for name in blocks or {}:
            if len(name) != 1:
                raise ValueError(f"blocks: {name!r} is not one letter; call a block by the letter that the layout has")
        known |= blocks or {}
        for layer, letter in enumerate(word):
            if letter not in known:
                meanings = ", ".join(f"{name} ({mixer.type})" for name, mixer in known.items())
                raise ValueError(f"{place}[{layer}]: {letter!r} stands for nothing; use {meanings}, or add a block")
        unused = [name for name in blocks or {} if name not in word]
        if unused:
            raise ValueError(f"blocks: the layout {word!r} has no {unused[0]!r}; use the block or remove it")
        return cls(layers=tuple(known[letter] for letter in word))

    def with_replaced(self, replaced: Iterable[int], mixer: MixerSpec, place: str = "layers") -> Self:
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

    def resolve(self, geometry: AttentionGeometry, place: str = "layout") -> Self:
        """Return the layout with every mixer's sizes filled in from the teacher's attention geometry.

        Raises:
            ValueError: sizes do not fit; names the layer.
        """
        resolved = []
        for layer, mixer in enumerate(self.layers):
            try:
                resolved.append(mixer.resolve(geometry))
            except ValueError as error:
                raise ValueError(f"{place}[{layer}]: {str(error).removeprefix('mixer: ')}") from None
        return type(self)(layers=tuple(resolved))

    def __str__(self) -> str:
        """One letter a layer, e.g. `aammaaga`; each mixer's spec says which."""
        return "".join(mixer.letter for mixer in self.layers)


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

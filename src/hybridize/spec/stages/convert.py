"""Replacing attention layers."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from hybridize.spec.layout import LayoutSpec
from hybridize.spec.mixers import AttentionSpec, KimiDeltaAttentionSpec, Mamba1Spec, MixerSpec, parse_mixer
from hybridize.spec.stages.base import TEACHER, MixedStage


class ConvertStage(MixedStage):
    """Replace attention layers of a model by a mixer, or by several kinds.

    Attributes:
        model: the teacher, or a stage that made a hybrid of which further layers are to be replaced.
        layers: the layers to replace now by `mixer`; or else
        ranking: the rank stage whose least important ones to replace, and
        num_layers: how many of them; or else
        search: the search stage whose layout to take; or else
        layout: what every layer is to be: one letter a layer, e.g. `aamgaaaa`, or a list of mixers. Layers that are not
            attention already stay as they are.
        blocks: what letters of the layout stand for, where it is not their kind's default, e.g.
            `{m: {type: mamba1, state_size: 32}}`.
        seed: of what is drawn at random.
    """

    kind: Literal["convert"] = "convert"
    model: str = TEACHER
    layers: tuple[int, ...] | None = None
    ranking: str | None = None
    num_layers: int | None = Field(default=None, gt=0)
    search: str | None = None
    layout: str | tuple[MixerSpec, ...] | None = None
    blocks: dict[str, MixerSpec] = Field(default_factory=dict)
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _no_mixer_beside_a_layout(cls, value: Any) -> Any:
        # A stage that was written down whole names its default; that nobody has asked for.
        if isinstance(value, dict) and value.get("mixer") not in (None, Mamba1Spec().model_dump(mode="json")):
            for what in ("search", "layout"):
                if value.get(what) is not None:
                    raise ValueError(f"mixer: the {what} says what every layer becomes; remove mixer")
        return value

    @field_validator("mixer")
    @classmethod
    def _not_attention(cls, value: MixerSpec) -> MixerSpec:
        if isinstance(value, AttentionSpec):
            raise ValueError("a layer is converted to a mixer other than attention; use mamba1")
        return value

    @field_validator("layout", mode="before")
    @classmethod
    def _layers_by_name(cls, value: object) -> object:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list | tuple) or not value:
            raise ValueError("write one letter a layer, in quotes where all are digits, or a list of mixers")
        return tuple(parse_mixer(item, f"layout[{layer}]") for layer, item in enumerate(value))

    @field_validator("blocks", mode="before")
    @classmethod
    def _blocks_by_name(cls, value: object) -> object:
        if isinstance(value, dict):
            return {str(name): parse_mixer(item, f"blocks.{name}") for name, item in value.items()}
        return value

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if [self.layers, self.ranking, self.search, self.layout].count(None) != 3:
            raise ValueError("give either layers, or ranking and num_layers, or search, or layout")
        if (self.ranking is None) != (self.num_layers is None):
            raise ValueError("ranking and num_layers go together; give both or neither")
        if self.search is not None and self.model != TEACHER:
            raise ValueError(f"model: a search is about the teacher, not about {self.model!r}; remove model")
        if self.blocks and not isinstance(self.layout, str):
            raise ValueError("blocks: they say what letters of a layout mean; give a layout of letters")
        if isinstance(self.layout, str):
            LayoutSpec.read(self.layout, self.blocks)
        if self.init == "attention_gate" and any(isinstance(mixer, KimiDeltaAttentionSpec) for mixer in self.made):
            raise ValueError(
                "init: attention_gate makes the output gate of the output projection, but Kimi delta attention's gate "
                "is of low rank; use neutral"
            )
        return self

    @property
    def whole_layout(self) -> LayoutSpec | None:
        """What every layer is to be, where that is said; sizes may be open."""
        if self.layout is None:
            return None
        return (
            LayoutSpec.read(self.layout, self.blocks)
            if isinstance(self.layout, str)
            else LayoutSpec(layers=self.layout)
        )

    @property
    def made(self) -> tuple[MixerSpec, ...]:
        """The mixers that replace attention; of a whole layout all, those that were there before included.

        None are known before a search has been run.
        """
        layout = self.whole_layout
        if layout is not None:
            return tuple(layout.layers[layer] for layer in layout.replaced)
        if self.search is not None:
            return ()
        return (self.mixer,) * (len(self.layers or ()) or self.num_layers or 0)

    @property
    def made_of(self) -> str:
        """The kinds of mixers that replace attention, in words, e.g. `mamba1` or `2 mamba1, 3 identity`."""
        if self.search is not None:
            return f"what {self.search} finds"
        kinds = [mixer.type for mixer in self.made] or ["attention" if self.layout is not None else self.mixer.type]
        counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        return kinds[0] if len(counts) == 1 else ", ".join(f"{count} {kind}" for kind, count in counts.items())

    @property
    def models(self) -> tuple[str, ...]:
        """The model to convert."""
        return (self.model,)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The model, and the ranking or the search if one decides."""
        return (*super().inputs, *(name for name in (self.ranking, self.search) if name))

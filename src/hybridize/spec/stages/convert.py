"""Replacing attention layers."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from hybridize.spec.mixers import AttentionSpec, Mamba1Spec
from hybridize.spec.stages.base import TEACHER, MixedStage


class ConvertStage(MixedStage):
    """Replace attention layers of a model by a mixer.

    Attributes:
        model: the teacher, or a stage that made a hybrid of which further layers are to be replaced.
        layers: the layers to replace now; or else
        ranking: the rank stage whose least important ones to replace, and
        num_layers: how many of them.
        seed: of what is drawn at random.
    """

    kind: Literal["convert"] = "convert"
    model: str = TEACHER
    layers: tuple[int, ...] | None = None
    ranking: str | None = None
    num_layers: int | None = Field(default=None, gt=0)
    seed: int = 0

    @field_validator("mixer")
    @classmethod
    def _not_attention(cls, value: AttentionSpec | Mamba1Spec) -> AttentionSpec | Mamba1Spec:
        if isinstance(value, AttentionSpec):
            raise ValueError("a layer is converted to a mixer other than attention; use mamba1")
        return value

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.layers is None) == (self.ranking is None):
            raise ValueError("give either layers, or ranking and num_layers")
        if (self.ranking is None) != (self.num_layers is None):
            raise ValueError("ranking and num_layers go together; give both or neither")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """The model to convert."""
        return (self.model,)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The model, and the ranking if one decides."""
        return (*super().inputs, *((self.ranking,) if self.ranking else ()))

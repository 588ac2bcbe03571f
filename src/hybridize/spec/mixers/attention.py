"""Layers without a recurrence: the teacher's attention, whole or through a window, and nothing at all."""

from typing import ClassVar, Literal

from pydantic import Field

from hybridize.spec.mixers.base import Mixer


class AttentionSpec(Mixer):
    """The teacher's own attention, left as it is."""

    letter: ClassVar[str] = "a"
    type: Literal["attention"] = "attention"


class SlidingWindowSpec(Mixer):
    """The teacher's own attention, seeing the last `window` tokens only (as in Longformer, arXiv 2004.05150).

    Attributes:
        window: tokens seen, the current one included.
        sink: give every head one learnt logit that takes part in the softmax and reads nothing, in the place of the
            first tokens that heads rest on and that a window hides (arXiv 2309.17453; learnt as in gpt-oss,
            arXiv 2508.10925).
    """

    letter: ClassVar[str] = "s"
    type: Literal["sliding_window"] = "sliding_window"
    window: int = Field(default=4096, gt=0)
    sink: bool = False


class IdentitySpec(Mixer):
    """Nothing: the layer's attention adds zero to the residual stream, as when a layer is left out to rank it."""

    letter: ClassVar[str] = "i"
    type: Literal["identity"] = "identity"

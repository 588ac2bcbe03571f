"""The one table of transfers: for every mixer, the module that knows how attention becomes it.

To add a mixer, add a row to `RULES`; `plan_transfer` reads this table and nothing else.
"""

from typing import Any, Protocol, get_args

from hybridize.spec import AttentionGeometry, GatedDeltaNetSpec, KimiDeltaAttentionSpec, Mamba1Spec, Mamba2Spec
from hybridize.spec.base import Spec
from hybridize.spec.stages.base import Init
from hybridize.transfer import gated_delta_net, kimi_delta_attention, mamba1, mamba2
from hybridize.transfer.attention import AttentionTensors
from hybridize.transfer.expressions import Expression

INITS: tuple[str, ...] = get_args(Init)


class TransferRule(Protocol):
    """What a mixer's module of this room offers."""

    def fresh_expressions(self, spec: Any, initializer_range: float) -> dict[str, Expression]:
        """Every tensor of the mixer as its constructor makes it, by its name within the mixer."""

    def carry_attention(
        self, spec: Any, attention: AttentionTensors, init: str, initializer_range: float, place: str
    ) -> dict[str, Expression]:
        """Every tensor of the mixer with attention's carried over, by any init but `random`.

        Raises:
            ValueError: the sizes do not fit; names `place`, the size and the remedy.
        """

    def pairing_note(self, spec: Any, geometry: AttentionGeometry, init: str) -> str:
        """A sentence on which of the mixer's heads pair the right query, key and value."""


RULES: dict[type[Spec], TransferRule] = {
    GatedDeltaNetSpec: gated_delta_net,
    KimiDeltaAttentionSpec: kimi_delta_attention,
    Mamba1Spec: mamba1,
    Mamba2Spec: mamba2,
}

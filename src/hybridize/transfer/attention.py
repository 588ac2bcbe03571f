"""The tensors of the attention that a mixer takes over, as expressions."""

from collections.abc import Sequence
from dataclasses import dataclass

from hybridize.models import Projection
from hybridize.spec import AttentionGeometry
from hybridize.spec.mixers import CarriesAttention
from hybridize.transfer.expressions import Blend, Constant, Expression, Take


@dataclass(frozen=True)
class AttentionTensors:
    """One layer's attention: what a mixer's tensors can be made of.

    Attributes:
        geometry: its sizes.
        q: weight of the query projection: the rows meant, where one tensor holds several projections.
        k: weight of the key projection.
        v: weight of the value projection.
        o: weight of the output projection.
        q_bias: bias of the query projection; None if it has none. Likewise the next three.
        k_bias: bias of the key projection.
        v_bias: bias of the value projection.
        o_bias: bias of the output projection.
        q_norm: what the norm of queries multiplies by: [head_dim], or [heads · head_dim] where it spans the whole
            width; None if there is none.
        k_norm: what the norm of keys multiplies by.
    """

    geometry: AttentionGeometry
    q: Take
    k: Take
    v: Take
    o: Take
    q_bias: Take | None = None
    k_bias: Take | None = None
    v_bias: Take | None = None
    o_bias: Take | None = None
    q_norm: Expression | None = None
    k_norm: Expression | None = None

    @classmethod
    def of(
        cls,
        geometry: AttentionGeometry,
        source: str,
        projections: Sequence[Projection],
        norms: Sequence[str] = (),
        norm_offset: float = 0.0,
    ) -> "AttentionTensors":
        """Name the tensors of an attention module.

        Args:
            geometry: of the attention; it says whether there are biases and norms.
            source: full name of the module.
            projections: of queries, keys, values and output, within the module.
            norms: names of the norms of queries and keys within the module.
            norm_offset: what the norms add to their weight.
        """
        q, k, v, o = (Take(f"{source}.{part.name}.weight", part.rows, why=_what(part)) for part in projections)
        q_bias, k_bias, v_bias, o_bias = (
            Take(f"{source}.{part.name}.bias", part.rows, why=_what(part)) if biased else None
            for part, biased in zip(projections, [geometry.qkv_bias] * 3 + [geometry.output_bias], strict=True)
        )
        q_norm, k_norm = None, None
        if norms:
            q_norm, k_norm = (_norm(f"{source}.{name}.weight", norm_offset) for name in norms)
        return cls(geometry, q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm)

    @property
    def weights(self) -> tuple[str, ...]:
        """Full names of the projections' weights, each once."""
        return tuple(dict.fromkeys(take.source for take in (self.q, self.k, self.v, self.o)))

    @property
    def biases(self) -> tuple[str, ...]:
        """Full names of the biases there are, each once."""
        takes = (self.q_bias, self.k_bias, self.v_bias, self.o_bias)
        return tuple(dict.fromkeys(take.source for take in takes if take is not None))

    @property
    def norms(self) -> tuple[str, ...]:
        """Full names of the norms' weights."""
        return tuple(
            leaf.source
            for norm in (self.q_norm, self.k_norm)
            if norm is not None
            for leaf in norm.leaves()
            if isinstance(leaf, Take)
        )


def check_norm(spec: CarriesAttention, width: int, width_name: str, geometry: AttentionGeometry, place: str) -> None:
    """Check that the teacher's norms of queries and keys fit a mixer that is to have some.

    Args:
        spec: the mixer, resolved.
        width: of the heads that it normalises.
        width_name: what the spec calls that.
        geometry: of the teacher's attention.
        place: what to call the mixer in errors.

    Raises:
        ValueError: they span something else.
    """
    if spec.qk_norm != geometry.qk_norm:
        raise ValueError(
            f"{place}.qk_norm: {spec.qk_norm!r} differs from the teacher's {geometry.qk_norm!r}, so its norms' weights "
            "do not fit; leave qk_norm open, or set it to 'none'"
        )
    if spec.qk_norm == "head" and width != geometry.head_dim:
        raise ValueError(
            f"{place}.qk_norm: the teacher normalises queries and keys over heads of width {geometry.head_dim}, but "
            f"the mixer's have {width_name} {width}; set that to {geometry.head_dim}, or qk_norm to 'none'"
        )


def _norm(name: str, offset: float) -> Expression:
    """The factor of a norm that multiplies by `offset` + weight."""
    if not offset:
        return Take(name)
    return Blend(((1.0, Take(name)), (1.0, Constant(offset, (1,), f"{offset:g}, which its norm adds"))))


def _what(part: Projection) -> str:
    """The rows of a projection in words, e.g. `32..47 (its values)`."""
    if part.rows is None:
        return ""
    runs: list[list[int]] = []
    for row in part.rows:
        if runs and row == runs[-1][1] + 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    spans = [f"{first}..{last}" for first, last in runs]
    if len(spans) > 3:
        spans = [spans[0], spans[1], "...", spans[-1]]
    return f"{', '.join(spans)} (its {part.what})"

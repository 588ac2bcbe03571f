"""Selective state spaces: Mamba-1 with per-head B and C, the paper's, and Mamba-2."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from hybridize.spec.mixers.base import AttentionGeometry, HasHeads, TakesSteps, check_multiples


class Mamba1Spec(TakesSteps):
    """The paper's mixer: a Mamba-1 selective scan with per-head B and C (arXiv 2511.02651, 2312.00752).

    Attributes:
        state_size: N, states per channel. The paper: 16.
        d_inner: channels of the scan; default: query heads x head_dim, as in the paper.
        d_xb: width of x and B before they are repeated to d_inner; default: key/value heads x head_dim.
        dt_rank: rank of the step-size projection; default ceil(hidden_size / 16), as in Mamba.
        conv_kernel: taps of the causal depthwise convolution on x.
        dt_bias_mode: `single` adds the step-size bias once; `double` twice, as published checkpoints expect.
    """

    letter: ClassVar[str] = "m"
    type: Literal["mamba1"] = "mamba1"
    state_size: int = Field(default=16, gt=0)
    d_inner: int | None = Field(default=None, gt=0)
    d_xb: int | None = Field(default=None, gt=0)
    dt_rank: int | None = Field(default=None, gt=0)
    conv_kernel: int = Field(default=4, ge=2)
    dt_bias_mode: Literal["single", "double"] = "single"

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_multiples({"d_inner": self.d_inner, "d_xb": self.d_xb}, "state_size", self.state_size)
        check_multiples({"d_inner": self.d_inner}, "d_xb", self.d_xb)
        return self

    @property
    def num_heads(self) -> int:
        """H: heads of the scan, each of state_size channels with its own C."""
        assert self.d_inner is not None, "resolve the spec first"
        return self.d_inner // self.state_size

    @property
    def num_groups(self) -> int:
        """G: groups of heads that share B and the raw x."""
        assert self.d_xb is not None, "resolve the spec first"
        return self.d_xb // self.state_size

    def resolve(self, geometry: AttentionGeometry) -> Self:
        """Return the spec with every size filled in from the teacher's attention.

        A norm of the teacher's heads is left out, unless asked for, where the scan's heads are narrower than they.

        Raises:
            ValueError: the sizes do not divide one another.
        """
        sizes = {
            "d_inner": geometry.query_width,
            "d_xb": geometry.kv_width,
            "dt_rank": -(-geometry.hidden_size // 16),
            **self._attention_sizes(geometry),
        }
        if geometry.qk_norm == "head" and self.state_size != geometry.head_dim:
            sizes["qk_norm"] = "none"
        return self._filled(sizes)


class Mamba2Spec(HasHeads):
    """Mamba-2, a selective state space with one decay per head (SSD, arXiv 2405.21060), with C per head.

    A head has `head_dim` channels and a state of `head_dim` x `state_size`. As in the paper's Mamba-1, x and B
    come in groups, as the teacher's values and keys do, and C in heads, as its queries.

    Attributes:
        state_size: N, width of B and C; default: the teacher's head_dim.
        head_dim: P, channels of a head; default: `state_size`.
        gate_norm: an RMS norm, per head, of the gated output, before the output projection.
    """

    letter: ClassVar[str] = "2"
    type: Literal["mamba2"] = "mamba2"
    state_size: int | None = Field(default=None, gt=0)
    head_dim: int | None = Field(default=None, gt=0)
    gate_norm: bool = True

    def resolve(self, geometry: AttentionGeometry) -> Self:
        """Return the spec with every size filled in from the teacher's attention.

        Raises:
            ValueError: the sizes do not divide one another.
        """
        state_size = self.state_size or geometry.head_dim
        width = self.head_dim or state_size
        return self._filled(
            {
                "state_size": state_size,
                "head_dim": width,
                **self._head_counts(geometry, width),
                **self._attention_sizes(geometry),
            }
        )

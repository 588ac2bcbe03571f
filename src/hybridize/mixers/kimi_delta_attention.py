"""Kimi delta attention: linear attention with a delta rule, one decay per channel of the keys (arXiv 2510.26692).

    S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ,    o_t = K^-0.5 S_tᵀ q_t
    α_t = exp(−exp(A_log) softplus(W_fb W_fa u_t + dt_bias)),      β_t = sigmoid(W_b u_t)
    out_t = W_o (RMSNorm(o_t) ⊙ sigmoid(W_gb W_ga u_t))

The projections of decays and gate have a low rank r. A_log is one number per head, dt_bias one per channel.

Legend: B batch, L length, E hidden size, H heads, G groups of heads, K width of queries and keys, V width of values.
"""

from torch import Tensor, nn

from hybridize.mixers.delta_rule import DeltaRuleMixer
from hybridize.ops.kimi_delta import kimi_delta_attention, kimi_delta_attention_step
from hybridize.spec.mixers import KimiDeltaAttentionSpec


class KimiDeltaAttentionMixer(DeltaRuleMixer):
    """Kimi delta attention as a drop-in for an attention module; see `DeltaRuleMixer`.

    Its own parameters: `f_a_proj` and `f_b_proj` for decays, `g_a_proj` and `g_b_proj` for the gate.
    """

    recurrence = staticmethod(kimi_delta_attention)
    recurrence_step = staticmethod(kimi_delta_attention_step)
    decay_per_channel = True
    spec: KimiDeltaAttentionSpec

    def _add_projections(self) -> None:
        rank = self.spec.gate_rank
        if rank is None:
            raise ValueError(f"spec: {self.spec!r} has open sizes; call spec.resolve(geometry) first")
        self.f_a_proj = nn.Linear(self.hidden_size, rank, bias=False)
        self.f_b_proj = nn.Linear(rank, self.head_channels, bias=False)
        if self.spec.gate != "none":
            self.g_a_proj = nn.Linear(self.hidden_size, rank, bias=False)
            self.g_b_proj = nn.Linear(rank, self.head_channels, bias=False)

    @property
    def _first_projections(self) -> tuple[nn.Linear, nn.Linear | None]:
        return self.f_a_proj, None if self.spec.gate == "none" else self.g_a_proj

    def _decay_inputs(self, projected: Tensor) -> Tensor:
        return self.f_b_proj(projected)

    def _gate_inputs(self, projected: Tensor) -> Tensor:
        return self.g_b_proj(projected)

"""Gated delta net: linear attention with the gated delta rule, one decay per head (arXiv 2412.06464).

    S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,    o_t = K^-0.5 S_tᵀ q_t
    α_t = exp(−exp(A_log) softplus(W_a u_t + dt_bias)),      β_t = sigmoid(W_b u_t)
    out_t = W_o (RMSNorm(o_t) ⊙ SiLU(W_g u_t))

Legend: B batch, L length, E hidden size, H heads, G groups of heads, K width of queries and keys, V width of values.
"""

from torch import nn

from hybridize.mixers.delta_rule import DeltaRuleMixer
from hybridize.ops.gated_delta import gated_delta_rule, gated_delta_rule_step


class GatedDeltaNetMixer(DeltaRuleMixer):
    """Gated delta net as a drop-in for an attention module; see `DeltaRuleMixer`.

    Its own parameters: `a_proj` for decays and `g_proj` for the gate.
    """

    recurrence = staticmethod(gated_delta_rule)
    recurrence_step = staticmethod(gated_delta_rule_step)
    decay_per_channel = False

    def _add_projections(self) -> None:
        self.a_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        if self.spec.gate != "none":
            self.g_proj = nn.Linear(self.hidden_size, self.head_channels, bias=False)

    @property
    def _first_projections(self) -> tuple[nn.Linear, nn.Linear | None]:
        return self.a_proj, None if self.spec.gate == "none" else self.g_proj

"""What the two mixers with a delta rule share: all but how decays and the output gate are made.

    q, k, v = act(conv(W_q u)), act(conv(W_k u)), act(conv(W_v u)),  q and k scaled to length 1
    o = delta rule of q, k, v with decays exp(−exp(A_log) softplus(f(u) + dt_bias)) and β = sigmoid(W_b u)
    out = W_o (RMSNorm(o) ⊙ act(gate(u)))

Queries come in heads, keys and values in groups, and are convolved in groups too. Decays, norms and the state are
computed in fp32 whatever the module's dtype.

Legend: B batch, L length, E hidden size, H heads, G groups of heads, K width of queries and keys, V width of values
(V = K), X channels, of the convolution H K + G K + G V, T its taps; M slots of a pool.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import sigmoid

from hybridize.mixers.base import (
    Mixer,
    MixerState,
    check_inputs,
    check_step_inputs,
    draw_step_bias,
)
from hybridize.mixers.norms import BlockRMSNorm
from hybridize.mixers.packing import PackedLinears, project_together
from hybridize.ops.causal_conv import causal_conv, causal_conv_step, causal_conv_step_in_place
from hybridize.ops.delta_rule.gates import log_decays, unit_length
from hybridize.ops.delta_rule.in_place import delta_rule_step_in_place
from hybridize.ops.gated_norm import gated_norm
from hybridize.ops.precision import at_least_fp32
from hybridize.spec.mixers import GatedDeltaNetSpec, KimiDeltaAttentionSpec


class DeltaRuleMixer(Mixer):
    """A delta rule as a drop-in for an attention module; a subclass names the recurrence, makes decays and gate.

    Its parameters: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `b_proj`; `conv1d` over q | k | v; `A_log`, one per head;
    `dt_bias`, one per decay; the subclass's projections; and as the spec has it, `gate_bias`, `q_norm.weight`,
    `k_norm.weight`, and `o_norm.weight` over a head's channels.

    Args:
        spec: a resolved spec.
        hidden_size: E.
        initializer_range: standard deviation of the linear layers' initial weights.

    Raises:
        ValueError: the spec is not resolved, or asks for the bias of a gate that it has not.
    """

    recurrence: ClassVar[Callable[..., tuple[Tensor, Tensor | None]]]
    recurrence_step: ClassVar[Callable[..., tuple[Tensor, Tensor]]]
    decay_per_channel: ClassVar[bool]

    def __init__(
        self,
        spec: GatedDeltaNetSpec | KimiDeltaAttentionSpec,
        hidden_size: int,
        *,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(spec, hidden_size, initializer_range=initializer_range)
        if (
            spec.head_dim is None
            or spec.num_heads is None
            or spec.num_groups is None
            or spec.norm_eps is None
            or None in (spec.qkv_bias, spec.output_bias, spec.qk_norm)
        ):
            raise ValueError(f"spec: {spec!r} has open sizes; call spec.resolve(geometry) first")
        self.spec = spec
        self.initializer_range = initializer_range
        self.hidden_size, self.head_dim = hidden_size, spec.head_dim
        self.num_heads, self.num_groups, self.conv_kernel = spec.num_heads, spec.num_groups, spec.conv_kernel
        self.head_channels, self.group_channels = spec.num_heads * spec.head_dim, spec.num_groups * spec.head_dim
        conv_channels = self.head_channels + 2 * self.group_channels
        self.q_proj = nn.Linear(hidden_size, self.head_channels, bias=bool(spec.qkv_bias))
        self.k_proj = nn.Linear(hidden_size, self.group_channels, bias=bool(spec.qkv_bias))
        self.v_proj = nn.Linear(hidden_size, self.group_channels, bias=bool(spec.qkv_bias))
        self.q_norm = self.k_norm = self.o_norm = None
        if spec.qk_norm != "none":
            per_head = spec.qk_norm == "head"
            spans = (self.head_dim,) * 2 if per_head else (self.head_channels, self.group_channels)
            self.q_norm, self.k_norm = (BlockRMSNorm(span, span, spec.norm_eps) for span in spans)
        self.conv1d = nn.Conv1d(conv_channels, conv_channels, spec.conv_kernel, groups=conv_channels, bias=False)
        self.b_proj = nn.Linear(hidden_size, spec.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(spec.num_heads))
        num_decays = spec.num_heads * (spec.head_dim if self.decay_per_channel else 1)
        self.dt_bias = nn.Parameter(torch.empty(num_decays))
        self._add_projections()
        if spec.gate_bias:
            self.gate_bias = nn.Parameter(torch.empty(self.head_channels))
        if spec.output_norm:
            self.o_norm = BlockRMSNorm(self.head_dim, self.head_dim, spec.norm_eps)
        self.o_proj = nn.Linear(self.head_channels, hidden_size, bias=bool(spec.output_bias))
        self._packed: PackedLinears | None = None
        self.reset_parameters()

    @abstractmethod
    def _add_projections(self) -> None:
        """Allocate the projections that give decays and the output gate."""

    @property
    @abstractmethod
    def _first_projections(self) -> tuple[nn.Linear, nn.Linear | None]:
        """Those of the input that decays and gate are made of; None: no gate."""

    def _decay_inputs(self, projected: Tensor) -> Tensor:
        """What dt_bias is added to, [..., H] or [..., H K], of the first projection's outputs."""
        return projected

    def _gate_inputs(self, projected: Tensor) -> Tensor:
        """The output gate before bias and activation, [..., H V], of the first projection's outputs."""
        return projected

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise as the papers' constructors do: decay rates uniform, step sizes log-uniform.

        Args:
            generator: source of randomness; None: torch's global seed.
        """
        spec = self.spec
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, self.initializer_range, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, BlockRMSNorm):
                module.reset_parameters()
        tap_bound = self.conv_kernel**-0.5
        self.conv1d.weight.uniform_(-tap_bound, tap_bound, generator=generator)
        rate = torch.empty(self.num_heads, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(rate.uniform_(spec.decay_min, spec.decay_max, generator=generator).log())
        self.dt_bias.copy_(draw_step_bias(self.dt_bias, spec.dt_min, spec.dt_max, spec.dt_init_floor, generator))
        if spec.gate_bias:
            self.gate_bias.zero_()

    def state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the state: [B, X, T] and [B, H, K, V]."""
        return {
            "conv": (batch_size, self.conv1d.out_channels, self.conv_kernel),
            "ssm": (batch_size, self.num_heads, self.head_dim, self.head_dim),
        }

    def forward(
        self,
        hidden_BLE: Tensor,
        *,
        starts_BL: Tensor | None = None,
        valid_BL: Tensor | None = None,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, MixerState | None]:
        """Mix along L; see `Mixer.forward`.

        Padding may stand on the left, or on the right when no state is returned.

        Raises:
            ValueError: a mask or the state does not go with the input; names it and the remedy.
        """
        check_inputs(self, self.hidden_size, hidden_BLE, starts_BL, valid_BL, state)
        padding_BL1 = None if valid_BL is None else ~valid_BL.unsqueeze(-1)
        if padding_BL1 is not None:
            hidden_BLE = hidden_BLE.masked_fill(padding_BL1, 0.0)
        qkv_BLX = torch.cat(
            self._normed(*(proj(hidden_BLE) for proj in (self.q_proj, self.k_proj, self.v_proj))), dim=-1
        )
        decay_proj, gate_proj = self._first_projections
        g = log_decays(self._decay_inputs(decay_proj(hidden_BLE)), self.A_log, self.dt_bias, self.decay_per_channel)
        beta_BLH = sigmoid(at_least_fp32(self.b_proj(hidden_BLE)))
        if padding_BL1 is not None:
            qkv_BLX = qkv_BLX.masked_fill(padding_BL1, 0.0)  # biases and norms make something of nothing
            g = g.masked_fill(padding_BL1.view(*padding_BL1.shape, *[1] * (g.ndim - 3)), 0.0)
            beta_BLH = beta_BLH.masked_fill(padding_BL1, 0.0)
        weight_XT, activation = self.conv1d.weight.squeeze(1), self._conv_activation
        new_state = None
        if state is not None and hidden_BLE.shape[1] == 1:
            conv_BXT, ssm_BHKV = state
            if starts_BL is not None:
                conv_BXT = conv_BXT.masked_fill(starts_BL.unsqueeze(-1), 0.0)
                ssm_BHKV = ssm_BHKV.masked_fill(starts_BL[..., None, None], 0.0)
            qkv_BX, window_BXT = causal_conv_step(conv_BXT, qkv_BLX[:, 0], weight_XT, None, activation)
            q_BHK, k_BGK, v_BGV = self._of_unit_length(*self._split(qkv_BX))
            o_BHV, ssm_BHKV = self.recurrence_step(ssm_BHKV, q_BHK, k_BGK, v_BGV, g[:, 0], beta_BLH[:, 0])
            o_BLHV = o_BHV.unsqueeze(1)
            if padding_BL1 is not None:
                window_BXT = torch.where(padding_BL1, conv_BXT.to(window_BXT.dtype), window_BXT)
            if return_state:
                new_state = MixerState(window_BXT, ssm_BHKV)
        else:
            qkv_BLX, window = causal_conv(
                qkv_BLX,
                weight_XT,
                activation=activation,
                starts_BL=starts_BL,
                window_BDK=None if state is None else state.conv,
                return_window=return_state,
            )
            q_BLHK, k_BLGK, v_BLGV = self._of_unit_length(*self._split(qkv_BLX))
            o_BLHV, ssm = self.recurrence(
                q_BLHK,
                k_BLGK,
                v_BLGV,
                g,
                beta_BLH,
                starts_BL=starts_BL,
                initial_state_BHKV=None if state is None else state.ssm,
                return_final_state=return_state,
            )
            if window is not None and ssm is not None:
                new_state = MixerState(window, ssm)
        return self.o_proj(self._gated(o_BLHV, None if gate_proj is None else gate_proj(hidden_BLE))), new_state

    @torch.no_grad()
    def step_in_place(
        self,
        hidden_BE: Tensor,
        conv_MDW: Tensor,
        ssm_M: Tensor,
        slot_B: Tensor | None = None,
        null_slot: int | None = None,
    ) -> Tensor:
        """Mix one token of each of many sequences, whose states lie in pools; see `Mixer.step_in_place`."""
        check_step_inputs(self, self.hidden_size, hidden_BE, ssm_M, slot_B, null_slot)
        together, parts = project_together(self._packed, self._input_projections, hidden_BE)
        q, k, v, decay_inputs, beta_inputs_BH = parts[:5]
        if self.q_norm is None:
            qkv_BX = together[:, : self.conv1d.in_channels]
        else:
            qkv_BX = torch.cat(self._normed(q, k, v), dim=-1)
        qkv_BX = causal_conv_step_in_place(
            conv_MDW, slot_B, qkv_BX, self.conv1d.weight.squeeze(1), None, self._conv_activation, null_slot=null_slot
        )
        decay_inputs = self._decay_inputs(decay_inputs)
        if self.decay_per_channel:
            decay_inputs = decay_inputs.unflatten(-1, (self.num_heads, self.head_dim))
        o_BHV = delta_rule_step_in_place(
            ssm_M,
            slot_B,
            *self._split(qkv_BX),
            decay_inputs,
            beta_inputs_BH,
            A_log_H=self.A_log,
            dt_bias=self.dt_bias,
            unit_length=self.spec.l2_norm,
            null_slot=null_slot,
        )
        return self.o_proj(self._gated(o_BHV, parts[5] if len(parts) > 5 else None))

    def pack_projections(self) -> None:
        """Let `step_in_place` make the projections of its input in one product; see `Mixer.pack_projections`."""
        self._packed = PackedLinears(self._input_projections)

    @property
    def _input_projections(self) -> list[nn.Linear]:
        decay_proj, gate_proj = self._first_projections
        projections = [self.q_proj, self.k_proj, self.v_proj, decay_proj, self.b_proj]
        return projections if gate_proj is None else [*projections, gate_proj]

    @property
    def _conv_activation(self) -> Literal["silu"] | None:
        return "silu" if self.spec.conv_activation == "silu" else None

    def _normed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values out of their projections, normalised if the spec says so."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., X] to queries [..., H, K], keys [..., G, K] and values [..., G, V]: views."""
        q, k, v = qkv.split([self.head_channels, self.group_channels, self.group_channels], dim=-1)
        return tuple(tensor.unflatten(-1, (-1, self.head_dim)) for tensor in (q, k, v))

    def _of_unit_length(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys scaled to length 1 if the spec says so; and the values."""
        return (unit_length(q), unit_length(k), v) if self.spec.l2_norm else (q, k, v)

    def _gated(self, o_BLHV: Tensor, projected: Tensor | None) -> Tensor:
        """The normalised and gated output, [..., H V], of the gate's first projection."""
        return gated_norm(
            o_BLHV.flatten(-2),
            None if projected is None else self._gate_inputs(projected),
            activation="sigmoid" if self.spec.gate == "sigmoid" else "silu",
            gate_bias_D=self.gate_bias if self.spec.gate_bias else None,
            norm_weight=None if self.o_norm is None else self.o_norm.weight,
            width=self.head_dim,
            eps=0.0 if self.o_norm is None else self.o_norm.eps,
        )

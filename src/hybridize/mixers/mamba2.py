"""Mamba-2 with grouped x and B and per-head C: a state space with one decay per head (SSD, arXiv 2405.21060).

    z, x, B, C, dt = W_in u
    x, B, C = act(causal_conv(x, B, C))
    Δ = softplus(dt + dt_bias),  S_t = exp(-Δ_t e^{A_log}) S_{t-1} + Δ_t x_t B_tᵀ,  y_t = S_t C_t + D x_t
    out = W_out norm(y ⊙ SiLU(z))

What stands for keys and values comes in groups of heads, as in the paper's Mamba-1 (arXiv 2511.02651); queries come in
heads. The norm is one of each head, where Mamba-2 has one of all or of a group, so that heads can live apart. Biases
and norms of queries and keys are there where the replaced attention has them.

Legend: B batch, L length, E hidden size, H heads, G groups of heads, P channels of a head, N states per channel,
X = G P + G N + H N channels of the convolution over x | B | C, K its taps; M slots of a pool.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from hybridize.mixers.base import (
    NO_STEP,
    Mixer,
    MixerState,
    check_inputs,
    check_step_inputs,
    draw_step_bias,
)
from hybridize.mixers.norms import BlockRMSNorm
from hybridize.ops.causal_conv import causal_conv, causal_conv_step, causal_conv_step_in_place
from hybridize.ops.gated_norm import gated_norm
from hybridize.ops.precision import at_least_fp32
from hybridize.ops.ssd import ssd, ssd_step, ssd_step_in_place
from hybridize.spec.mixers import Mamba2Spec


class Mamba2Mixer(Mixer):
    """Mamba-2 as a drop-in for an attention module.

    Its parameters: `in_proj.weight`, rows z | x | B | C | dt; `conv1d` over x | B | C; `A_log`, `D` and `dt_bias`, one
    per head; `out_proj`; and as the spec has it, `qkv_bias` over x | B | C, `gate_bias`, `q_norm.weight` for C,
    `k_norm.weight` for B, `norm.weight`, `out_proj.bias`.

    Args:
        spec: a resolved spec.
        hidden_size: E.
        initializer_range: standard deviation of the linear layers' initial weights.

    Raises:
        ValueError: the spec is not resolved.
    """

    def __init__(self, spec: Mamba2Spec, hidden_size: int, *, initializer_range: float = 0.02) -> None:
        super().__init__(spec, hidden_size, initializer_range=initializer_range)
        if (
            spec.num_heads is None
            or spec.num_groups is None
            or spec.head_dim is None
            or spec.state_size is None
            or spec.norm_eps is None
            or None in (spec.qkv_bias, spec.output_bias, spec.qk_norm)
        ):
            raise ValueError(f"spec: {spec!r} has open sizes; call spec.resolve(geometry) first")
        self.spec = spec
        self.initializer_range = initializer_range
        self.num_heads, self.num_groups = spec.num_heads, spec.num_groups
        self.head_dim, self.num_states = spec.head_dim, spec.state_size
        self.inner_width = self.num_heads * self.head_dim
        self.conv_widths = [
            self.num_groups * self.head_dim,
            self.num_groups * self.num_states,
            self.num_heads * self.num_states,
        ]
        conv_width = sum(self.conv_widths)
        self.in_proj = nn.Linear(hidden_size, self.inner_width + conv_width + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(conv_width, conv_width, spec.conv_kernel, groups=conv_width)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.qkv_bias = nn.Parameter(torch.empty(conv_width)) if spec.qkv_bias else None
        self.gate_bias = nn.Parameter(torch.empty(self.inner_width)) if spec.gate_bias else None
        self.k_norm = self.q_norm = self.norm = None
        if spec.qk_norm != "none":
            _, k_width, q_width = self.conv_widths
            spans = (self.num_states, self.num_states) if spec.qk_norm == "head" else (k_width, q_width)
            self.k_norm, self.q_norm = (BlockRMSNorm(span, span, spec.norm_eps) for span in spans)
        if spec.gate_norm:
            self.norm = BlockRMSNorm(self.head_dim, self.inner_width, spec.norm_eps)
        self.out_proj = nn.Linear(self.inner_width, hidden_size, bias=bool(spec.output_bias))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise as Mamba-2's constructor does: decay rates uniform, step sizes log-uniform.

        Args:
            generator: source of randomness; None: torch's global seed.
        """
        spec = self.spec
        for projection in (self.in_proj, self.out_proj):
            projection.weight.normal_(0.0, self.initializer_range, generator=generator)
        tap_bound = spec.conv_kernel**-0.5
        for taps in (self.conv1d.weight, self.conv1d.bias):
            taps.uniform_(-tap_bound, tap_bound, generator=generator)
        self.dt_bias.copy_(draw_step_bias(self.dt_bias, spec.dt_min, spec.dt_max, spec.dt_init_floor, generator))
        rate = torch.empty(self.num_heads, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(rate.uniform_(spec.decay_min, spec.decay_max, generator=generator).log())
        self.D.fill_(1.0)
        for bias in (self.qkv_bias, self.gate_bias, self.out_proj.bias):
            if bias is not None:
                bias.zero_()
        for norm in (self.q_norm, self.k_norm, self.norm):
            if norm is not None:
                norm.reset_parameters()

    def state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the state."""
        return {
            "conv": (batch_size, sum(self.conv_widths), self.spec.conv_kernel),
            "ssm": (batch_size, self.num_heads, self.head_dim, self.num_states),
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
        check_inputs(self, self.in_proj.in_features, hidden_BLE, starts_BL, valid_BL, state)
        z_BLD, inner_BLX, dt_BLH = self._project(hidden_BLE, valid_BL)
        taps_XK, activation = self.conv1d.weight.squeeze(1), self._conv_activation
        A_H = -torch.exp(at_least_fp32(self.A_log))
        options = {"D_H": at_least_fp32(self.D), "dt_bias_H": at_least_fp32(self.dt_bias)}

        if state is not None and hidden_BLE.shape[1] == 1:
            if starts_BL is not None:
                state = _forget(state, starts_BL[:, 0])
            inner_BX, window_BXK = causal_conv_step(
                state.conv, inner_BLX[:, 0], taps_XK, self.conv1d.bias, activation=activation
            )
            x_BGP, B_BGN, C_BHN = self._split(inner_BX)
            y_BHP, ssm_BHPN = ssd_step(state.ssm, x_BGP, dt_BLH[:, 0], A_H, B_BGN, C_BHN, **options)
            if valid_BL is not None:
                window_BXK = torch.where(valid_BL.unsqueeze(-1), window_BXK, state.conv)
            new_state = MixerState(window_BXK, ssm_BHPN)
            return self._read_out(y_BHP.unsqueeze(1), z_BLD), new_state if return_state else None

        inner_BLX, window = causal_conv(
            inner_BLX,
            taps_XK,
            self.conv1d.bias,
            activation=activation,
            starts_BL=starts_BL,
            window_BDK=None if state is None else state.conv,
            return_window=return_state,
        )
        x_BLGP, B_BLGN, C_BLHN = self._split(inner_BLX)
        y_BLHP, ssm = ssd(
            x_BLGP,
            dt_BLH,
            A_H,
            B_BLGN,
            C_BLHN,
            starts_BL=starts_BL,
            initial_state_BHPN=None if state is None else state.ssm,
            return_final_state=return_state,
            **options,
        )
        out_BLE = self._read_out(y_BLHP, z_BLD)
        if window is None or ssm is None:
            return out_BLE, None
        return out_BLE, MixerState(window, ssm)

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
        check_step_inputs(self, self.in_proj.in_features, hidden_BE, ssm_M, slot_B, null_slot)
        z_BD, inner_BX, dt_BH = self._project(hidden_BE, None)
        taps_XK = self.conv1d.weight.squeeze(1)
        inner_BX = causal_conv_step_in_place(
            conv_MDW, slot_B, inner_BX, taps_XK, self.conv1d.bias, self._conv_activation, null_slot=null_slot
        )
        x_BGP, B_BGN, C_BHN = self._split(inner_BX)
        y_BHP = ssd_step_in_place(
            ssm_M,
            slot_B,
            x_BGP,
            dt_BH,
            self.A_log,
            B_BGN,
            C_BHN,
            D_H=self.D,
            dt_bias_H=self.dt_bias,
            null_slot=null_slot,
        )
        return self._read_out(y_BHP, z_BD)

    @property
    def _conv_activation(self) -> Literal["silu"] | None:
        return "silu" if self.spec.conv_activation == "silu" else None

    def _project(self, hidden_BLE: Tensor, valid_BL: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, the convolution's input and the step sizes before their bias; padding gives zero and no step."""
        padding = None if valid_BL is None else ~valid_BL.unsqueeze(-1)
        if padding is not None:
            hidden_BLE = hidden_BLE.masked_fill(padding, 0.0)
        widths = [self.inner_width, sum(self.conv_widths), self.num_heads]
        z_BLD, inner_BLX, dt_BLH = self.in_proj(hidden_BLE).split(widths, dim=-1)
        if self.qkv_bias is not None:
            inner_BLX = inner_BLX + self.qkv_bias.to(inner_BLX.dtype)
        if self.q_norm is not None and self.k_norm is not None:
            x_BLV, B_BLV, C_BLV = inner_BLX.split(self.conv_widths, dim=-1)
            inner_BLX = torch.cat([x_BLV, self.k_norm(B_BLV), self.q_norm(C_BLV)], dim=-1)
        if padding is not None:
            dt_BLH = dt_BLH.masked_fill(padding, NO_STEP)
            inner_BLX = inner_BLX.masked_fill(padding, 0.0)
        return z_BLD, inner_BLX, dt_BLH

    def _split(self, inner_X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split into x by group, B by group and C by head: views."""
        x, B, C = inner_X.split(self.conv_widths, dim=-1)
        groups = (self.num_groups, -1)
        return x.unflatten(-1, groups), B.unflatten(-1, groups), C.unflatten(-1, (self.num_heads, -1))

    def _read_out(self, y_BLHP: Tensor, z_BLD: Tensor) -> Tensor:
        """Gate, normalise, project: [B, L, E]."""
        gated_BLD = gated_norm(
            y_BLHP.flatten(-2),
            z_BLD,
            gate_bias_D=self.gate_bias,
            norm_weight=None if self.norm is None else self.norm.weight,
            width=self.head_dim,
            eps=0.0 if self.norm is None else self.norm.eps,
            gate_first=True,
        )
        return self.out_proj(gated_BLD)


def _forget(state: MixerState, starts_B: Tensor) -> MixerState:
    """The state, zero in the rows where a document starts."""
    return MixerState(
        state.conv.masked_fill(starts_B[:, None, None], 0.0), state.ssm.masked_fill(starts_B[:, None, None, None], 0.0)
    )

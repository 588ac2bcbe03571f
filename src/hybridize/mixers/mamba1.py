"""The paper's mixer: Mamba-1 with per-head B and C and grouped x and B (arXiv 2511.02651, 2312.00752).

Tensor names and row orders are those of the published checkpoints. A, D, the step-size bias and the state are
used in fp32 whatever the module's dtype. Biases and norms of queries and keys, here C and B, are there where the spec
has them.

Legend: B batch, L length, E hidden size, D channels (d_inner), N states per channel, H heads of N channels,
G groups of heads, X = G N channels before they are repeated to D, K convolution taps, R rank of the step size's
projection, M slots of a pool.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hybridize.mixers.base import (
    NO_STEP,
    Mixer,
    MixerState,
    check_inputs,
    check_step_inputs,
    draw_step_bias,
)
from hybridize.mixers.norms import BlockRMSNorm
from hybridize.mixers.packing import PackedLinears, project_together
from hybridize.ops.causal_conv import causal_conv, causal_conv_step, causal_conv_step_in_place
from hybridize.ops.precision import at_least_fp32
from hybridize.ops.selective_scan import selective_scan, selective_scan_step, selective_scan_step_in_place
from hybridize.spec.mixers import Mamba1Spec


class Mamba1Mixer(Mixer):
    """Mamba-1 as a drop-in for an attention module.

    Its parameters: `in_proj.weight`, rows z | x | B | C; `dt_in_proj` and `dt_proj`, the step size's; `conv1d` over x,
    repeated for heads; `A_log`, `D`; `out_proj`; and as the spec has it, `qkv_bias` over x | B | C, `gate_bias`,
    `q_norm.weight` for C, `k_norm.weight` for B, `out_proj.bias`.

    Args:
        spec: a resolved spec.
        hidden_size: E.
        initializer_range: standard deviation of the linear layers' initial weights.

    Raises:
        ValueError: the spec is not resolved.
    """

    def __init__(self, spec: Mamba1Spec, hidden_size: int, *, initializer_range: float = 0.02) -> None:
        super().__init__(spec, hidden_size, initializer_range=initializer_range)
        if spec.d_inner is None or spec.d_xb is None or spec.dt_rank is None:
            raise ValueError(f"spec: {spec!r} has open sizes; call spec.resolve(geometry) first")
        self.spec = spec
        self.initializer_range = initializer_range
        self.d_inner, self.d_xb = spec.d_inner, spec.d_xb
        self.num_states, self.num_heads, self.num_groups = spec.state_size, spec.num_heads, spec.num_groups
        self.conv_kernel = spec.conv_kernel
        self.in_proj = nn.Linear(hidden_size, 2 * spec.d_inner + 2 * spec.d_xb, bias=False)
        self.dt_in_proj = nn.Linear(hidden_size, spec.dt_rank, bias=False)
        self.dt_proj = nn.Linear(spec.dt_rank, spec.d_inner, bias=True)
        self.conv1d = nn.Conv1d(spec.d_inner, spec.d_inner, spec.conv_kernel, groups=spec.d_inner)
        self.A_log = nn.Parameter(torch.empty(spec.d_inner, spec.state_size))
        self.D = nn.Parameter(torch.empty(spec.d_inner))
        self.qkv_bias = nn.Parameter(torch.empty(2 * spec.d_xb + spec.d_inner)) if spec.qkv_bias else None
        self.gate_bias = nn.Parameter(torch.empty(spec.d_inner)) if spec.gate_bias else None
        self.k_norm = self.q_norm = None
        if spec.qk_norm in ("head", "width"):
            assert spec.norm_eps is not None, "resolve the spec first"
            spans = (spec.state_size, spec.state_size) if spec.qk_norm == "head" else (spec.d_xb, spec.d_inner)
            self.k_norm, self.q_norm = (BlockRMSNorm(span, span, spec.norm_eps) for span in spans)
        self.out_proj = nn.Linear(spec.d_inner, hidden_size, bias=bool(spec.output_bias))
        self._packed: PackedLinears | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise as Mamba's constructor does: slow and fast decays, step sizes log-uniform.

        Args:
            generator: source of randomness; None: torch's global seed.
        """
        spec = self.spec
        for projection in (self.in_proj, self.dt_in_proj, self.out_proj):
            projection.weight.normal_(0.0, self.initializer_range, generator=generator)
        tap_bound = self.conv_kernel**-0.5
        self.conv1d.weight.uniform_(-tap_bound, tap_bound, generator=generator)
        self.conv1d.bias.uniform_(-tap_bound, tap_bound, generator=generator)
        rank_bound = self.dt_in_proj.out_features**-0.5
        self.dt_proj.weight.uniform_(-rank_bound, rank_bound, generator=generator)
        steps = (spec.dt_min, spec.dt_max, spec.dt_init_floor)
        self.dt_proj.bias.copy_(draw_step_bias(self.dt_proj.bias, *steps, generator))
        states = torch.arange(1, self.num_states + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        self.D.fill_(1.0)
        for bias in (self.qkv_bias, self.gate_bias, self.out_proj.bias):
            if bias is not None:
                bias.zero_()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the state."""
        return {
            "conv": (batch_size, self.d_inner, self.conv_kernel),
            "ssm": (batch_size, self.d_inner, self.num_states),
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
        if valid_BL is not None:
            hidden_BLE = hidden_BLE.masked_fill(~valid_BL.unsqueeze(-1), 0.0)
        z_BLD, x_BLX, B_BLX, C_BLD = self._divide(self.in_proj(hidden_BLE))
        dt_BLD = linear(self.dt_in_proj(hidden_BLE), self.dt_proj.weight)
        if valid_BL is not None:
            dt_BLD = dt_BLD.masked_fill(~valid_BL.unsqueeze(-1), NO_STEP)
            if self.qkv_bias is not None:  # it makes something of nothing
                x_BLX = x_BLX.masked_fill(~valid_BL.unsqueeze(-1), 0.0)
        B_BLGN = B_BLX.unflatten(-1, (self.num_groups, self.num_states))
        C_BLHN = C_BLD.unflatten(-1, (self.num_heads, self.num_states))
        A_DN = -torch.exp(at_least_fp32(self.A_log))
        D_D, dt_bias_D = at_least_fp32(self.D), self._step_bias()
        taps_DK, repeat = self.conv1d.weight.squeeze(1), self._repeat

        if state is not None and hidden_BLE.shape[1] == 1:
            if starts_BL is not None:
                state = MixerState(*(tensor.masked_fill(starts_BL.unsqueeze(-1), 0.0) for tensor in state))
            x_BD, window_BDK = causal_conv_step(state.conv, x_BLX[:, 0], taps_DK, self.conv1d.bias, repeat=repeat)
            y_BD, ssm_BDN = selective_scan_step(
                state.ssm,
                x_BD,
                dt_BLD[:, 0],
                A_DN,
                B_BLGN[:, 0],
                C_BLHN[:, 0],
                D_D=D_D,
                dt_bias_D=dt_bias_D,
                z_BD=z_BLD[:, 0],
            )
            if valid_BL is not None:
                window_BDK = torch.where(valid_BL.unsqueeze(-1), window_BDK, state.conv)
            new_state = MixerState(window_BDK, ssm_BDN)
            return self.out_proj(y_BD.unsqueeze(1)), new_state if return_state else None

        x_BLD, window = causal_conv(
            x_BLX,
            taps_DK,
            self.conv1d.bias,
            repeat=repeat,
            starts_BL=starts_BL,
            window_BDK=None if state is None else state.conv,
            return_window=return_state,
        )
        y_BLD, ssm = selective_scan(
            x_BLD,
            dt_BLD,
            A_DN,
            B_BLGN,
            C_BLHN,
            D_D=D_D,
            dt_bias_D=dt_bias_D,
            z_BLD=z_BLD,
            starts_BL=starts_BL,
            initial_state_BDN=None if state is None else state.ssm,
            return_final_state=return_state,
        )
        out_BLE = self.out_proj(y_BLD)
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
        _, (inner_BW, dt_BR) = project_together(self._packed, self._input_projections, hidden_BE)
        z_BD, x_BX, B_BX, C_BD = self._divide(inner_BW)
        x_BD = causal_conv_step_in_place(
            conv_MDW,
            slot_B,
            x_BX,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            repeat=self._repeat,
            null_slot=null_slot,
        )
        y_BD = selective_scan_step_in_place(
            ssm_M,
            slot_B,
            x_BD,
            linear(dt_BR, self.dt_proj.weight),
            self.A_log,
            B_BX.unflatten(-1, (self.num_groups, self.num_states)),
            C_BD.unflatten(-1, (self.num_heads, self.num_states)),
            D_D=self.D,
            dt_bias_D=self._step_bias(),
            z_BD=z_BD,
            null_slot=null_slot,
        )
        return self.out_proj(y_BD)

    @property
    def _repeat(self) -> tuple[int, int]:
        """Each group's x goes to all of its heads."""
        return self.num_states, self.num_heads // self.num_groups

    def _step_bias(self) -> Tensor:
        bias_D = at_least_fp32(self.dt_proj.bias)
        return bias_D * 2.0 if self.spec.dt_bias_mode == "double" else bias_D

    def pack_projections(self) -> None:
        """Let `step_in_place` make the projections of its input in one product; see `Mixer.pack_projections`."""
        self._packed = PackedLinears(self._input_projections)

    @property
    def _input_projections(self) -> list[nn.Linear]:
        return [self.in_proj, self.dt_in_proj]

    def _divide(self, projected_BLW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gate z [B, L, D], x and B [B, L, X], C [B, L, D]; with their biases and norms, if any."""
        z_BLD, inner_BLW = projected_BLW.split([self.d_inner, 2 * self.d_xb + self.d_inner], dim=-1)
        if self.gate_bias is not None:
            z_BLD = z_BLD + self.gate_bias.to(z_BLD.dtype)
        if self.qkv_bias is not None:
            inner_BLW = inner_BLW + self.qkv_bias.to(inner_BLW.dtype)
        x_BLX, B_BLX, C_BLD = inner_BLW.split([self.d_xb, self.d_xb, self.d_inner], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            B_BLX, C_BLD = self.k_norm(B_BLX), self.q_norm(C_BLD)
        return z_BLD, x_BLX, B_BLX, C_BLD

"""State space duality through the kernels of flash-linear-attention, on a GPU.

Its gated linear attention with one decay per head ("simple GLA") is the same recurrence: C are queries, B keys, Δ x
values, Δ A the logarithms of decays. The kernels want B and x for every head, so both are repeated, and one row with
the bounds of its documents.

Legend: B batch, L length, H heads, G groups of heads, P channels of a head, N states per channel; S sequences, which
are documents or parts of them within one row.
"""

import torch
from torch import Tensor

from hybridize.ops.fla_package import STRONGEST_DECAY, is_installed, miscompiles_gradients, sequence_bounds
from hybridize.ops.ssd.step_sizes import step_sizes


def fla_refuses(x_BLGP: Tensor, num_states: int, differentiable: bool) -> str:
    """Why the kernels cannot serve, as the end of a sentence; empty if they can.

    Args:
        x_BLGP: the scan's x.
        num_states: N.
        differentiable: whether gradients are asked for.
    """
    if x_BLGP.device.type != "cuda":
        return f"x lies on {x_BLGP.device.type}, and its kernels run on cuda"
    if not is_installed():
        return "package fla-core is not installed (it comes with hybridize[gpu])"
    if x_BLGP.dtype not in (torch.bfloat16, torch.float16):
        return "its kernels are for bf16 and fp16; they would multiply fp32 numbers as TF32"
    if differentiable and miscompiles_gradients(x_BLGP.device):
        return "its gradients need Triton 3.7.1 or newer on Hopper"
    if differentiable and (x_BLGP.shape[-1] % 2 or num_states % 2):
        return "its gradients need even widths"
    return ""


def ssd_fla(
    x_BLGP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = True,
    starts_BL: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan with flash-linear-attention's kernel; ask `fla_refuses` first.

    The arguments are those of `hybridize.ops.ssd.ssd`, already checked.

    Returns:
        y of shape [B, L, H, P] in x's dtype, and the state after the last token, [B, H, P, N].
    """
    from fla.ops.simple_gla import chunk_simple_gla

    batch, length = x_BLGP.shape[:2]
    heads_per_group = C_BLHN.shape[2] // x_BLGP.shape[2]
    with torch.autocast("cuda", enabled=False):
        delta_BLH = step_sizes(dt_BLH, dt_bias_H, dt_softplus, torch.float32)
        x_BLHP = x_BLGP.repeat_interleave(heads_per_group, dim=2)
        rows = (
            C_BLHN.to(x_BLGP.dtype),
            B_BLGN.to(x_BLGP.dtype).repeat_interleave(heads_per_group, dim=2),
            (delta_BLH.unsqueeze(-1) * x_BLHP).to(x_BLGP.dtype),
            (delta_BLH * A_H.float()).clamp(min=STRONGEST_DECAY),
        )
        initial_BHPN = None if initial_state_BHPN is None else initial_state_BHPN.float()
        if starts_BL is None:
            y_BLHP, state_BHNP = chunk_simple_gla(
                *(tensor.contiguous() for tensor in rows),
                scale=1.0,
                initial_state=None if initial_BHPN is None else initial_BHPN.transpose(2, 3).contiguous(),
                output_final_state=True,
            )
        else:
            bounds_S1, first_B, last_B = sequence_bounds(starts_BL)
            initial_SHNP = None
            if initial_BHPN is not None:
                going_on_BHPN = initial_BHPN.masked_fill(starts_BL[:, 0, None, None, None], 0.0)
                shape = (len(bounds_S1) - 1, *going_on_BHPN.transpose(2, 3).shape[1:])
                initial_SHNP = going_on_BHPN.new_zeros(shape).index_copy(0, first_B, going_on_BHPN.transpose(2, 3))
            y_1THP, state_SHNP = chunk_simple_gla(
                *(tensor.flatten(0, 1).unsqueeze(0).contiguous() for tensor in rows),
                scale=1.0,
                initial_state=initial_SHNP,
                output_final_state=True,
                cu_seqlens=bounds_S1,
            )
            y_BLHP = y_1THP.unflatten(1, (batch, length)).squeeze(0)
            state_BHNP = state_SHNP.index_select(0, last_B)
        if D_H is not None:
            y_BLHP = torch.addcmul(y_BLHP.float(), x_BLHP.float(), D_H.float().unsqueeze(-1)).to(x_BLGP.dtype)
        return y_BLHP, state_BHNP.transpose(2, 3).contiguous()

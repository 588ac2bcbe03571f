"""State space duality through the kernels of flash-linear-attention, on a GPU.

Its gated linear attention with one decay per head ("simple GLA") is the same recurrence: C are queries, B keys, Δ x
values, Δ A the logarithms of decays. The kernels want B and x for every head, so both are repeated, and one row with
the bounds of its documents.

Legend: B batch, L length, H heads, G groups of heads, P channels of a head, N states per channel; S sequences, which
are documents or parts of them within one row.
"""

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybridize.ops.ssd.step_sizes import step_sizes


@functools.cache
def _gradients_are_wrong(device_index: int) -> bool:
    """Whether Triton miscompiles the kernel of the decays' gradient there; fla itself refuses to run it then.

    The bug is in Triton from 3.4.0 on, before 3.7.1, on Hopper (fla-org/flash-linear-attention issue 640).
    """
    if torch.version.hip is not None or torch.cuda.get_device_capability(device_index)[0] != 9:
        return False
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3] if part.isdecimal())
    return (3, 4) <= version < (3, 7, 1)


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("fla") is not None and importlib.util.find_spec("triton") is not None


def fla_refuses(x_BLGP: Tensor, differentiable: bool) -> str:
    """Why the kernels cannot serve, as the end of a sentence; empty if they can.

    Args:
        x_BLGP: the scan's x.
        differentiable: whether gradients are asked for.
    """
    if x_BLGP.device.type != "cuda":
        return f"x lies on {x_BLGP.device.type}, and its kernels run on cuda"
    if not _is_installed():
        return "package fla-core is not installed (it comes with hybridize[gpu])"
    if x_BLGP.dtype not in (torch.bfloat16, torch.float16):
        return "its kernels are for bf16 and fp16; they would multiply fp32 numbers as TF32"
    if differentiable and _gradients_are_wrong(x_BLGP.device.index or 0):
        return "its gradients need Triton 3.7.1 or newer on Hopper"
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
            delta_BLH * A_H.float(),
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
            bounds_S1, first_B = _bounds(starts_BL)
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
            state_BHNP = state_SHNP.index_select(0, pad(first_B[1:] - 1, (0, 1), value=len(bounds_S1) - 2))
        if D_H is not None:
            y_BLHP = torch.addcmul(y_BLHP.float(), x_BLHP.float(), D_H.float().unsqueeze(-1)).to(x_BLGP.dtype)
        return y_BLHP, state_BHNP.transpose(2, 3).contiguous()


def _bounds(starts_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences' bounds in the batch as one row, [S + 1], and each batch row's first sequence, [B].

    A row of the batch begins a sequence, whether a document starts there or not.
    """
    begins_BL = starts_BL.clone()
    begins_BL[:, 0] = True
    bounds_S1 = pad(begins_BL.flatten().nonzero().squeeze(-1), (0, 1), value=begins_BL.numel())
    return bounds_S1, pad(begins_BL.sum(dim=1).cumsum(dim=0)[:-1], (1, 0))

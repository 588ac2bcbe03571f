"""The gated delta rule by flash-linear-attention's kernels.

Forward alone it is `chunk_gated_delta_rule`. Where a gradient is wanted, that kernel's backward pass refuses to run on
Hopper under Triton 3.4 to 3.7.0, whose compiler makes a wrong kernel of it, unless tilelang is installed, which the
package then takes by itself. There we call `chunk_kda` with each head's decay repeated over the channels of the keys:
the same function, right on every device, at about two and a half times the cost.

Legend: B batch, L length, H heads, G groups of heads, K width of queries and keys, V width of values.
"""

import os
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.ops.delta_rule import fla_kernels
from hybridize.ops.fla_package import miscompiles_gradients


def gated_delta_rule_fla(
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGV: Tensor,
    g_BLH: Tensor,
    beta_BLH: Tensor,
    *,
    scale: float,
    starts_BL: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernels; the arguments are those of `hybridize.ops.gated_delta.gated_delta_rule`, already checked.

    Returns:
        o of shape [B, L, H, V] in q's dtype, and the state after the last token, [B, H, K, V], fp32.

    Raises:
        ValueError: the package is not installed, or the inputs are not on a CUDA device.
    """
    fla_kernels.require(q_BLHK)
    options: dict[str, Any] = {"scale": scale, "starts_BL": starts_BL, "initial_state_BHKV": initial_state_BHKV}
    inputs = (q_BLHK, k_BLGK, v_BLGV, g_BLH, beta_BLH, initial_state_BHKV)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if differentiated and _backward_is_refused(q_BLHK.device):
        from fla.ops.kda import chunk_kda

        g_BLHK = g_BLH.unsqueeze(-1).expand(*g_BLH.shape, q_BLHK.shape[-1])
        return fla_kernels.call(chunk_kda, q_BLHK, k_BLGK, v_BLGV, g_BLHK, beta_BLH, **options)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return fla_kernels.call(chunk_gated_delta_rule, q_BLHK, k_BLGK, v_BLGV, g_BLH, beta_BLH, **options)


def _backward_is_refused(device: torch.device) -> bool:
    return miscompiles_gradients(device) and not _tilelang_takes_over()


@cache
def _tilelang_takes_over() -> bool:
    """Whether the package will find tilelang and the compiler that it needs, and has not been told to pass it by."""
    toolkits = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or any(root and (Path(root) / "bin" / "nvcc").exists() for root in toolkits)
    wanted = os.environ.get("FLA_TILELANG") != "0" and os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") != "1"
    return wanted and find_spec("tilelang") is not None and bool(nvcc)

"""Kimi delta attention by flash-linear-attention's `chunk_kda`, whose backward pass runs on Hopper too.

Legend: B batch, L length, H heads, G groups of heads, K width of queries and keys, V width of values.
"""

from torch import Tensor

from hybridize.ops.delta_rule import fla_kernels


def kimi_delta_attention_fla(
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGV: Tensor,
    g_BLHK: Tensor,
    beta_BLH: Tensor,
    *,
    scale: float,
    starts_BL: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; the arguments are those of `hybridize.ops.kimi_delta.kimi_delta_attention`, already checked.

    Returns:
        o of shape [B, L, H, V] in q's dtype, and the state after the last token, [B, H, K, V], fp32.

    Raises:
        ValueError: the package is not installed, or the inputs are not on a CUDA device.
    """
    fla_kernels.require(q_BLHK)
    from fla.ops.kda import chunk_kda

    return fla_kernels.call(
        chunk_kda,
        q_BLHK,
        k_BLGK,
        v_BLGV,
        g_BLHK,
        beta_BLH,
        scale=scale,
        starts_BL=starts_BL,
        initial_state_BHKV=initial_state_BHKV,
    )

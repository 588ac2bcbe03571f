"""The gated delta rule of gated delta net (arXiv 2412.06464).

    S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,    α_t = exp(g_t)
    o_t = scale · S_tᵀ q_t

The state takes keys to values. Each token lets it fade by α, erases a share β of what it holds at the token's key,
and writes the token's value there.

Legend: B batch, L length, H heads, G groups of heads, K width of queries and keys, V width of values. Head h reads the
keys and values of group h // (H/G); queries, decays and β are each head's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hybridize.ops.delta_rule import fla_kernels
from hybridize.ops.delta_rule.checks import check_sequences, check_step
from hybridize.ops.delta_rule.reference import delta_rule_reference
from hybridize.ops.delta_rule.step import delta_rule_step
from hybridize.ops.gated_delta.chunked import gated_delta_rule_chunked
from hybridize.ops.gated_delta.fla import gated_delta_rule_fla
from hybridize.ops.launch import is_learning, takes_kernel

__all__ = ["BACKENDS", "gated_delta_rule", "gated_delta_rule_step"]

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": delta_rule_reference,
    "chunked": gated_delta_rule_chunked,
    "fla": gated_delta_rule_fla,
}


def gated_delta_rule(
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGV: Tensor,
    g_BLH: Tensor,
    beta_BLH: Tensor,
    *,
    scale: float | None = None,
    starts_BL: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the recurrence over whole sequences, several documents in a row if need be.

    States and decays are in fp32, in fp64 if q is. Every tensor but `starts_BL` gets its gradient (once). It is stable
    where β |k|² stays below 2.

    Args:
        q_BLHK: queries, [B, L, H, K]; fp64, fp32, bf16 or fp16.
        k_BLGK: keys, one per group, [B, L, G, K].
        v_BLGV: values, one per group, [B, L, G, V].
        g_BLH: logarithms of the decays, at most 0, [B, L, H].
        beta_BLH: strengths of erasing and writing, [B, L, H].
        scale: factor of what is read; default: K^-0.5.
        starts_BL: bool, True at the first token of each document, [B, L]: the state, the initial one included, is
            zero before that token. None: one document, going on from the initial state.
        initial_state_BHKV: state before the first token, [B, H, K, V]; zero by default.
        return_final_state: whether to return the state after the last token.
        backend: `reference`, `chunked`, `fla`, or None: `fla` in half precision on CUDA where it is installed, else
            `chunked`.

    Returns:
        o [B, L, H, V] in q's dtype, and the final state [B, H, K, V] in fp32 (fp64) or None.

    Raises:
        ValueError: a shape, a dtype or the backend does not fit; names the argument, the value, the remedy.
    """
    check_sequences(
        q_BLHK, k_BLGK, v_BLGV, ("g_BLH", g_BLH), beta_BLH, starts_BL, initial_state_BHKV, per_channel=False
    )
    if backend is None:
        backend = "fla" if fla_kernels.takes(q_BLHK, v_BLGV) else "chunked"
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; use one of {', '.join(BACKENDS)}, or None")
    o_BLHV, state_BHKV = BACKENDS[backend](
        q_BLHK,
        k_BLGK,
        v_BLGV,
        g_BLH,
        beta_BLH,
        scale=q_BLHK.shape[-1] ** -0.5 if scale is None else scale,
        starts_BL=starts_BL,
        initial_state_BHKV=initial_state_BHKV,
    )
    return o_BLHV, state_BHKV if return_final_state else None


def gated_delta_rule_step(
    state_BHKV: Tensor,
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    g_BH: Tensor,
    beta_BH: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token.

    Args:
        state_BHKV: state before the token, [B, H, K, V]; left as it is.
        q_BHK: queries, [B, H, K].
        k_BGK: keys, one per group, [B, G, K].
        v_BGV: values, one per group, [B, G, V].
        g_BH: logarithms of the decays, at most 0, [B, H].
        beta_BH: strengths of erasing and writing, [B, H].
        scale: factor of what is read; default: K^-0.5.

    Returns:
        o [B, H, V] in q's dtype, and the new state [B, H, K, V] in fp32 (fp64 if q is).

    Raises:
        ValueError: a shape does not fit; names the argument, its value and the remedy.
    """
    named = (("g_BH", g_BH), ("beta_BH", beta_BH))
    check_step(state_BHKV, q_BHK, k_BGK, v_BGV, *named, per_channel=False)
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    if takes_kernel(q_BHK) and q_BHK.shape[0] and not is_learning(state_BHKV, q_BHK, k_BGK, v_BGV, g_BH, beta_BH):
        from hybridize.ops.delta_rule.triton_step import step_triton

        return step_triton(state_BHKV, q_BHK, k_BGK, v_BGV, g_BH, beta_BH, scale)
    dtype = torch.promote_types(q_BHK.dtype, torch.float32)
    decay_BH1 = torch.exp(g_BH.to(dtype)).unsqueeze(-1)
    return delta_rule_step(state_BHKV, q_BHK, k_BGK, v_BGV, decay_BH1, beta_BH, scale)

"""The way to flash-linear-attention's Triton kernels, for the ops with a delta rule.

The package is optional (`pip install hybridize[gpu]`) and imported only when a kernel is called.

Legend: B batch, L length, H heads, G groups of heads, K width of queries and keys, V width of values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridize.ops.fla_package import STRONGEST_DECAY, is_installed, sequence_bounds

# The widest heads that the kernels take.
_MAX_WIDTH = 256


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels are the right form for these inputs: half precision, on a CUDA device, not too wide."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    fits = max(q.shape[-1], v.shape[-1]) <= _MAX_WIDTH
    return q.device.type == "cuda" and half and fits and is_installed()


def require(q_BLHK: Tensor) -> None:
    """Check that the kernels can be called at all, where somebody asks for them by name.

    Raises:
        ValueError: the package is not installed, or the inputs are on another device, in fp64, or too wide.
    """
    if not is_installed():
        raise ValueError("backend: 'fla' is not installed; run pip install 'hybridize[gpu]', or pass None")
    if q_BLHK.device.type != "cuda":
        raise ValueError(f"backend: 'fla' runs on CUDA, but q is on {q_BLHK.device}; pass None")
    if q_BLHK.dtype == torch.float64 or q_BLHK.shape[-1] > _MAX_WIDTH:
        raise ValueError(
            f"backend: 'fla' takes no {q_BLHK.dtype} of width {q_BLHK.shape[-1]}, only up to fp32 and {_MAX_WIDTH}; "
            "pass None"
        )


def call(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGV: Tensor,
    g: Tensor,
    beta_BLH: Tensor,
    *,
    scale: float,
    starts_BL: Tensor | None,
    initial_state_BHKV: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Call a kernel of the package over sequences or, where documents are packed, over one row of documents.

    Keys and values are repeated for the heads of a group, which the kernels need where decays belong to heads.

    Args:
        kernel: takes q, k, v [B, L, H, ...], g, beta, scale, initial_state, output_final_state and cu_seqlens.
        q_BLHK: queries.
        k_BLGK: keys.
        v_BLGV: values.
        g: the decays' logarithms.
        beta_BLH: strengths of writing.
        scale: factor of what is read.
        starts_BL: True at the first token of each document.
        initial_state_BHKV: state before the first token; zero by default.
        **options: passed on.

    Returns:
        Outputs [B, L, H, V] in the queries' dtype, and the state after the last token [B, H, K, V] in fp32.
    """
    batch, length, num_heads = q_BLHK.shape[:3]
    heads_per_group = num_heads // k_BLGK.shape[2]
    k_BLHK, v_BLHV = (tensor.to(q_BLHK.dtype).repeat_interleave(heads_per_group, dim=2) for tensor in (k_BLGK, v_BLGV))
    tensors = {
        "q": q_BLHK,
        "k": k_BLHK,
        "v": v_BLHV,
        "g": g.float().clamp(min=STRONGEST_DECAY),
        "beta": beta_BLH.float(),
    }
    state = None if initial_state_BHKV is None else initial_state_BHKV.float()
    options |= {"scale": scale, "output_final_state": True}
    if starts_BL is None:
        o_BLHV, state_BHKV = kernel(**tensors, initial_state=state, **options)
        return o_BLHV, state_BHKV
    begins, first_documents, last_documents = sequence_bounds(starts_BL)
    states = None
    if state is not None:
        kept_BHKV = state.masked_fill(starts_BL[:, 0, None, None, None], 0.0)
        states = state.new_zeros(len(begins) - 1, *state.shape[1:]).index_copy(0, first_documents, kept_BHKV)
    row = {name: tensor.flatten(0, 1).unsqueeze(0) for name, tensor in tensors.items()}
    o_1TV, states = kernel(**row, initial_state=states, cu_seqlens=begins, **options)
    return o_1TV.view(batch, length, *o_1TV.shape[2:]), states.index_select(0, last_documents)

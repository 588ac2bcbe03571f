"""What the two ops with a delta rule share: checks, chunks, steps, the way to the GPU kernels.

A delta rule writes to a key what its value differs from what the state already holds there (arXiv 2406.06484):
S_t = α_t S_{t-1} + k_t u_tᵀ with u_t = β_t (v_t − (α_t S_{t-1})ᵀ k_t). `hybridize.ops.gated_delta` has one decay α
per head, `hybridize.ops.kimi_delta` one per channel of the keys. `in_place` is the door to both for steps over a pool
of states.
"""

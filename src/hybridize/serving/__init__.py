"""Serving: the vLLM plugin, and the only import of vllm.

`pip install hybridize[serve]`, then `vllm serve OUT`: vLLM finds `register` through its entry-point group and calls it
in each of its processes. A hybrid is vLLM's own model of the teacher's family, in which the attention of some layers
gives way to this package's mixers. vLLM keeps the mixers' states in its own cache, beside keys and values; the mixers
run unchanged, so what was trained is what is served.

Nothing here imports vllm before vLLM itself is running.
"""


def register() -> None:
    """Make vLLM know the hybrids of every family; may be called any number of times."""
    from hybridize.serving.registration import register_hybrids

    register_hybrids()

"""What a layout costs to run, as a function of how many layers are of which kind; imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridize.bench.prediction import GPUS, Gpu, predict
from hybridize.bench.scenarios import Scenario, read_scenarios
from hybridize.pipeline.serving_cost import LayerSizes
from hybridize.spec.base import choose
from hybridize.spec.mixers import AttentionSpec, MixerSpec

Cost = Callable[[Sequence[int]], float]
"""Takes the numbers of layers that are attention, and each of some mixers."""


def decode_bytes(
    config: Mapping[str, Any], mixers: Sequence[MixerSpec], *, context_tokens: int, concurrency: int
) -> Cost:
    """A cost function: bytes that a decode step must move for each sequence.

    Weights are read once a step, whatever the number of sequences; keys and values once, at most a window's; states are
    read and written.

    Args:
        config: the teacher's.
        mixers: what layers can become, sizes filled in or not.
        context_tokens: tokens of each sequence.
        concurrency: sequences in a step.

    Returns:
        A function of the numbers of layers that are attention, and each of the mixers.
    """
    sizes = LayerSizes(config)
    alone = [sizes.of(spec) for spec in (AttentionSpec(), *mixers)]
    of_layer = [
        sizes.dtype_bytes * size.parameters / concurrency
        + sizes.together([(1, size)]).context_bytes(context_tokens)
        + 2.0 * sum(size.states)
        for size in alone
    ]
    of_teacher = sizes.dtype_bytes * sizes.teacher.active_parameters / concurrency

    def cost(counts: Sequence[int]) -> float:
        return of_teacher + sum(count * each for count, each in zip(counts, of_layer, strict=True))

    return cost


def check_serving(gpu: str, scenario: str, place: str) -> tuple[Gpu, Scenario]:
    """A GPU and a scenario by their names.

    Raises:
        ValueError: one is unknown; names `place`.
    """
    choose(f"{place}.gpu", gpu, GPUS)
    try:
        return GPUS[gpu], read_scenarios([scenario])[0]
    except ValueError as error:
        raise ValueError(f"{place}.scenario{str(error).removeprefix('--scenario')}") from None


def served_seconds(config: Mapping[str, Any], mixers: Sequence[MixerSpec], gpu: Gpu, scenario: Scenario) -> Cost:
    """A cost function: seconds a generated token is predicted to take in vLLM, with as many sequences as fit.

    Args:
        config: the teacher's.
        mixers: what layers can become, sizes filled in or not.
        gpu: what it runs on.
        scenario: what it is asked.

    Returns:
        A function of the numbers of layers that are attention, and each of the mixers; infinite where the memory holds
        not even one sequence.
    """
    sizes = LayerSizes(config)
    alone = [sizes.of(spec) for spec in (AttentionSpec(), *mixers)]

    def cost(counts: Sequence[int]) -> float:
        speed = predict(sizes.together(zip(counts, alone, strict=True)), gpu, scenario).tokens_per_second
        return 1.0 / speed if speed else float("inf")

    return cost

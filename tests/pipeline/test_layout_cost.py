"""What a layout costs is what its parts hold, in the torch modules as in the formulas."""

import pytest

from hybridize.pipeline.layout_cost import decode_bytes
from hybridize.pipeline.sizes import TeacherShape, mixer_parameters, state_numbers
from hybridize.spec.mixers import (
    AttentionSpec,
    GatedDeltaNetSpec,
    IdentitySpec,
    KimiDeltaAttentionSpec,
    Mamba1Spec,
    Mamba2Spec,
    SlidingWindowSpec,
)

CONFIG = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 6,
    "intermediate_size": 96,
    "vocab_size": 128,
}
SHAPE = TeacherShape.of(CONFIG)
RECURRENT = (Mamba1Spec(), Mamba2Spec(), Mamba2Spec(state_size=8), GatedDeltaNetSpec(), KimiDeltaAttentionSpec())


@pytest.mark.parametrize("spec", RECURRENT, ids=lambda spec: spec.type)
def test_state_has_as_many_numbers_as_the_module_keeps(spec):
    import torch

    from hybridize.mixers import build_mixer

    resolved = spec.resolve(SHAPE.geometry)
    with torch.device("meta"):
        shapes = build_mixer(resolved, SHAPE.geometry.hidden_size).state_shapes(1)
    recurrence, convolution = state_numbers(spec, SHAPE.geometry)
    assert recurrence == torch.Size(shapes["ssm"]).numel()
    taps = shapes["conv"][-1]
    assert convolution * taps == torch.Size(shapes["conv"]).numel() * (taps - 1), "the oldest input is not needed"


def test_layers_without_a_recurrence_have_no_state():
    assert state_numbers(AttentionSpec(), SHAPE.geometry) == state_numbers(IdentitySpec(), SHAPE.geometry) == (0, 0)


def test_cost_adds_keys_and_values_states_and_a_share_of_the_weights():
    mixers = (Mamba1Spec(), SlidingWindowSpec(window=100), IdentitySpec())
    alone = decode_bytes(CONFIG, mixers, context_tokens=1000, concurrency=1)
    crowd = decode_bytes(CONFIG, mixers, context_tokens=1000, concurrency=10**12)
    token = 2 * 2 * 32  # a key and a value of 2 heads of 16, in bf16
    recurrence, convolution = state_numbers(Mamba1Spec(), SHAPE.geometry)
    assert crowd([6, 0, 0, 0]) == pytest.approx(6 * 1000 * token)
    assert crowd([3, 1, 1, 1]) == pytest.approx(3100 * token + 2 * (4 * recurrence + 2 * convolution))
    assert alone([6, 0, 0, 0]) - crowd([6, 0, 0, 0]) == pytest.approx(2 * SHAPE.active_parameters)
    more = mixer_parameters(Mamba1Spec(), SHAPE) - SHAPE.attention_parameters
    assert alone([5, 1, 0, 0]) - crowd([5, 1, 0, 0]) == pytest.approx(2 * (SHAPE.active_parameters + more))


def test_cost_knows_the_teachers_own_window():
    windowed = decode_bytes(CONFIG | {"sliding_window": 50}, (), context_tokens=1000, concurrency=10**12)
    assert windowed([6]) == pytest.approx(6 * 50 * 2 * 2 * 32)
    off = decode_bytes(
        CONFIG | {"sliding_window": 50, "use_sliding_window": False}, (), context_tokens=1000, concurrency=10**12
    )
    assert off([6]) == pytest.approx(6 * 1000 * 2 * 2 * 32)


@pytest.mark.parametrize("counts", [(16, 0, 0), (10, 40, 0), (3, 45, 2), (7, 5, 4), (0, 16, 0), (1, 1, 14), (6, 9, 1)])
def test_groups_of_a_search_are_those_of_a_plan_for_serving(counts):
    from hybridize.bench.prediction import CachePlan, ServedShape
    from hybridize.importance.search import kv_groups

    attention, state, window = counts
    windows = (None,) * attention + (100,) * window
    served = ServedShape(1, 1, 1.0, 1.0, 1, 128, windows, (4096,) * state)
    assert kv_groups(counts, (Mamba1Spec(), SlidingWindowSpec(window=100))) == CachePlan.of(served).groups


@pytest.mark.parametrize("word", ["aaaaaa", "amaaaa", "am2gka", "mmmmmm", "aassma", "iiaaaa"])
def test_predicted_seconds_are_those_of_a_plan_for_serving(word):
    from hybridize.bench.prediction import GPUS, predict
    from hybridize.bench.scenarios import Scenario
    from hybridize.pipeline.layout_cost import served_seconds
    from hybridize.pipeline.serving_cost import served_shape

    letters = "am2gksi"
    mixers = (
        Mamba1Spec(),
        Mamba2Spec(),
        GatedDeltaNetSpec(),
        KimiDeltaAttentionSpec(),
        SlidingWindowSpec(),
        IdentitySpec(),
    )
    scenario = Scenario(64, 8192)
    cost = served_seconds(CONFIG, mixers, GPUS["h100"], scenario)
    expected = predict(served_shape(CONFIG, word), GPUS["h100"], scenario).tokens_per_second
    assert 1 / cost([word.count(letter) for letter in letters]) == pytest.approx(expected, rel=1e-3)


def test_what_does_not_fit_into_the_memory_costs_infinitely():
    from dataclasses import replace

    from hybridize.bench.prediction import GPUS
    from hybridize.bench.scenarios import Scenario
    from hybridize.importance.search import Search
    from hybridize.pipeline.layout_cost import served_seconds

    tiny = replace(GPUS["h100"], memory=1.3e9)
    cost = served_seconds(CONFIG, (IdentitySpec(),), tiny, Scenario(64, 2**21))
    assert cost([6, 0]) == float("inf")
    with pytest.raises(
        ValueError, match="that of the teacher is infinite; reckon for shorter sequences or a larger GPU"
    ):
        Search((IdentitySpec(),), [[0.1] * 6], cost)

"""Predictions of serving follow vLLM's layout of its cache, and the bytes that a step moves."""

import dataclasses

import pytest

from hybridize.bench.prediction import (
    GPUS,
    CachePlan,
    ServedShape,
    StepCosts,
    cache_bytes,
    floor_seconds,
    group_warning,
    predict,
    step_seconds,
)
from hybridize.bench.scenarios import Scenario

IDEAL = StepCosts(1.0, 1.0, 0.0, 0.0, 1.0, 0.0)


def shape(attention=50, mixers=0, state=286_720, windows=()):
    """The paper's teacher by its round numbers, with so many layers of each kind."""
    return ServedShape(
        weight_bytes=30_000_000_000,
        read_bytes=28_000_000_000,
        flops_per_token=28e9,
        score_flops=4.0 * 4096,
        activation_bytes=117_000,
        kv_bytes=4096,
        windows=(None,) * attention + tuple(windows),
        states=(state,) * mixers,
    )


@pytest.mark.parametrize(
    ("attention", "mixers", "groups", "size"),
    [
        (50, 0, 1, 50),
        (25, 25, 2, 25),
        (24, 26, 2, 26),
        (20, 30, 3, 20),
        (10, 40, 5, 10),
        (4, 24, 7, 4),
        (3, 45, 16, 3),
        (1, 31, 32, 1),
        (0, 8, 1, 8),
        (45, 5, 10, 5),
    ],
)
def test_layers_are_grouped_as_vllm_groups_them(attention, mixers, groups, size):
    plan = CachePlan.of(shape(attention, mixers))
    assert (plan.groups, plan.group_layers) == (groups, size)


def test_pages_hold_a_state_in_whole_blocks_of_attention():
    plan = CachePlan.of(shape(10, 40))
    assert (plan.block_tokens, plan.page_bytes) == (80, 80 * 4096)  # 286,720 bytes are 70 tokens, and 16 divides 80
    assert plan.block_bytes == 10 * 80 * 4096
    assert plan.blocks(16385) == 205 + 4
    assert CachePlan.of(shape()).block_tokens == 16
    wide = CachePlan.of(shape(10, 40, state=2_134_016))  # a gated delta net's
    assert wide.block_tokens == 528


def test_window_keeps_its_tokens_only():
    plan = CachePlan.of(shape(2, 0, windows=(4096, 4096)))
    assert plan.groups == 2
    assert plan.blocks(16384) == 1024 + 257
    assert plan.blocks(100) == 14


def test_cache_holds_whole_sequences_beside_vllms_own_block():
    plan = CachePlan.of(shape(10, 40))
    assert plan.sequences(plan.block_bytes * (2 * 209 + 1), 16385) == 2
    assert plan.sequences(plan.block_bytes * (2 * 209), 16385) == 1
    assert plan.sequences(0.0, 16385) == 0


def test_teachers_cache_is_as_measured():
    """On one H200 vLLM 0.26 gave the paper's teacher 517k tokens at 0.92 of the memory."""
    teacher = dataclasses.replace(shape(), weight_bytes=29_944_000_000, activation_bytes=116_736)
    assert cache_bytes(teacher, GPUS["h200"], 0.92) / (50 * 4096) == pytest.approx(517_000, rel=0.02)


def test_floor_counts_weights_keys_values_and_states():
    hybrid = shape(10, 40)
    moved = 28e9 + 7 * (1000 * 10 * 4096 + 2 * 40 * 286_720)
    assert floor_seconds(hybrid, 1e12, 7, 1000) == pytest.approx(moved / 1e12)
    gpu = dataclasses.replace(GPUS["h200"], copy_bandwidth=1e12)
    assert step_seconds(hybrid, gpu, 7, 1000, 5, IDEAL) == pytest.approx(moved / 1e12)
    slow = dataclasses.replace(IDEAL, seconds_per_step=1.0, seconds_per_group=0.01)
    assert step_seconds(hybrid, gpu, 7, 1000, 5, slow) == pytest.approx(moved / 1e12 + 1 + 0.04)


def test_window_bounds_what_a_step_reads():
    assert shape(0, 0, windows=(100,)).context_bytes(1000) == 100 * 4096
    assert shape(0, 0, windows=(100,)).context_bytes(50) == 50 * 4096


def test_prediction_sums_a_scenario_up():
    gpu = GPUS["h200"]
    scenario = Scenario(1024, 8192)
    expected = predict(shape(10, 40), gpu, scenario, costs=IDEAL)
    middle = floor_seconds(shape(10, 40), gpu.copy_bandwidth, expected.sequences, 1024 + 4096)
    assert expected.step_ms == pytest.approx(1e3 * middle)
    assert expected.step_ms == pytest.approx(expected.floor_ms)
    prefill = expected.sequences * 1024 * (28e9 + 10 * 512 * 4 * 4096) / gpu.flops
    assert expected.prefill_seconds == pytest.approx(prefill)
    seconds = prefill + 8192 * middle
    assert expected.tokens_per_second == pytest.approx(expected.sequences * 8192 / seconds)
    assert expected.gpu_hours_per_million == pytest.approx(1e6 / expected.tokens_per_second / 3600)


def test_model_that_does_not_fit_has_no_speed():
    expected = predict(shape(), GPUS["l40s"], Scenario(1, 65536))
    assert (expected.sequences, expected.tokens_per_second) == (0, 0.0)
    assert expected.gpu_hours_per_million == float("inf")


def test_more_mixers_serve_more():
    rates = [predict(shape(50 - n, n), GPUS["h200"], Scenario(1, 16384)).tokens_per_second for n in (0, 25, 30, 40)]
    assert rates == sorted(rates)


@pytest.mark.parametrize(("attention", "mixers"), [(50, 0), (25, 25), (20, 30), (10, 40)])
def test_good_numbers_of_layers_are_not_warned_of(attention, mixers):
    assert group_warning("H", shape(attention, mixers)) is None


def test_many_groups_are_warned_of_with_a_better_split():
    text = group_warning("H-47", shape(3, 47))
    assert text.startswith("H-47: 3 attention + 47 mixer layers make 17 groups of 3")
    assert text.endswith("10 attention + 40 mixer would make fewer")


def test_empty_places_are_warned_of():
    text = group_warning("H", shape(20, 22, windows=(512,) * 31))
    assert "places in the cache stay empty" in text

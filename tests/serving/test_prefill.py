"""Prompts in rectangles: every token in its place once, padding on the left, little of it, states apart."""

import random
import time

import pytest
import torch

from hybridize.serving.prefill import plan_prefill


@pytest.fixture
def rng():
    seed = time.time_ns() % 2**31
    print(f"seed {seed}")
    return random.Random(seed)


def lengths_of(groups, lengths):
    return [[lengths[s] for s in group.sequences.tolist()] for group in groups]


def test_every_token_lies_in_its_place_once(rng):
    for _ in range(20):
        lengths = [rng.choice([1, 2, 3, rng.randint(1, 70)]) for _ in range(rng.randint(1, 12))]
        fresh = [rng.random() < 0.7 for _ in lengths]
        groups = plan_prefill(lengths, fresh, "cpu")
        assert sorted(s for group in groups for s in group.sequences.tolist()) == list(range(len(lengths)))
        hidden = torch.arange(1, sum(lengths) + 1, dtype=torch.float32).unsqueeze(1)
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        output = torch.zeros_like(hidden)
        for group in groups:
            rectangle = group.gather(hidden)
            for row, sequence in enumerate(group.sequences.tolist()):
                length = lengths[sequence]
                padding = rectangle.shape[1] - length
                assert rectangle[row, padding:].flatten().tolist() == list(
                    range(starts[sequence] + 1, starts[sequence] + length + 1)
                )
                assert not rectangle[row, :padding].any()
                if group.valid is not None:
                    assert group.valid[row].tolist() == [False] * padding + [True] * length
                else:
                    assert padding == 0
            group.scatter(rectangle, output)
        assert torch.equal(output, hidden)


def test_sequences_that_go_on_are_alone():
    groups = plan_prefill([8, 8, 8, 8], [True, False, True, False], "cpu")
    assert [(group.sequences.tolist(), group.fresh) for group in groups] == [
        ([1], False),
        ([3], False),
        ([0, 2], True),
    ]


def test_short_prompts_are_taken_together():
    assert lengths_of(plan_prefill([5] * 40, [True] * 40, "cpu"), [5] * 40) == [[5] * 40]


def test_padding_is_bounded(rng):
    lengths = [rng.randint(1, 500) for _ in range(200)]
    groups = plan_prefill(lengths, [True] * 200, "cpu")
    for members in lengths_of(groups, lengths):
        assert len(members) * max(members) <= 1.25 * sum(members)
    assert len(groups) < 60


def test_a_long_prompt_does_not_pad_the_short_ones():
    lengths = [1000, 10, 11, 12]
    assert lengths_of(plan_prefill(lengths, [True] * 4, "cpu"), lengths) == [[1000], [12, 11, 10]]

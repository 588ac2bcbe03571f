"""Each way to merge against the formula of its paper, whatever the sizes of chunks."""

import math

import pytest
import torch

from hybridize.merging import METHODS, methods
from hybridize.merging.methods import linear, slerp, ties

SIZES = [1, 63, 1000]


@pytest.fixture(params=[7, 1 << 16])
def chunk(request, monkeypatch):
    monkeypatch.setattr(methods, "CHUNK", request.param)


def draw(size, seed, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive_ties(sources, base, weights, density):
    """Entry by entry, in plain Python."""
    deltas = [[float(s) - float(b) for s, b in zip(source, base, strict=True)] for source in sources]
    keep = max(1, round(density * len(base)))
    for delta in deltas:
        least = sorted(map(abs, delta), reverse=True)[keep - 1]
        delta[:] = [d if abs(d) >= least else 0.0 for d in delta]
    merged = []
    for start, *column in zip(base.tolist(), *deltas, strict=True):
        mass = sum(w * d for w, d in zip(weights, column, strict=True))
        chosen = [(w, d) for w, d in zip(weights, column, strict=True) if w and d * mass > 0]
        merged.append(start + (sum(w * d for w, d in chosen) / sum(w for w, _ in chosen) if chosen else 0.0))
    return torch.tensor(merged)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (0.0, 0.25, 0.75)])
def test_linear_is_the_weighted_mean(chunk, size, weights):
    sources = [draw(size, seed) for seed in range(3)]
    merged, _ = linear(sources, None, weights, 1)
    expected = sum(w * s.double() for w, s in zip(weights, sources, strict=True))
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)


def test_linear_keeps_the_bits_of_entries_that_all_sources_share():
    sources = [draw(100_000, seed) for seed in range(3)]
    for source in sources[1:]:
        source[::3] = sources[0][::3]
    merged, _ = linear(sources, None, (0.3, 0.3, 0.4), 1)
    assert torch.equal(merged[::3], sources[0][::3])
    assert not torch.equal(0.3 * sources[0] + 0.3 * sources[0] + 0.4 * sources[0], sources[0])  # the plain sum does not


@pytest.mark.parametrize("method", [linear, slerp])
def test_a_weight_of_one_gives_that_source_bit_for_bit(chunk, method):
    one, two = draw(1000, 0), draw(1000, 1)
    assert torch.equal(method([one, two], None, (1.0, 0.0), 1)[0], one)
    assert torch.equal(method([one, two], None, (0.0, 1.0), 1)[0], two)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_slerp_goes_along_the_arc(chunk, share):
    one, two = draw(1000, 0), draw(1000, 1)
    two *= one.norm() / two.norm()
    merged, counts = slerp([one, two], None, (1 - share, share), 1)
    assert counts == {"num_linear": 0}
    assert merged.norm().item() == pytest.approx(one.norm().item(), rel=1e-5)

    def angle(a, b):
        return math.acos(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item())

    assert angle(one, merged) == pytest.approx(share * angle(one, two), abs=1e-5)
    assert angle(merged, two) == pytest.approx((1 - share) * angle(one, two), abs=1e-5)
    chord, _ = linear([one, two], None, (1 - share, share), 1)
    assert chord.norm() < 0.95 * one.norm() or share == 0.9  # the mean cuts the corner


@pytest.mark.parametrize(
    "two",
    [torch.zeros(5), torch.arange(1.0, 6), 3 * torch.arange(1.0, 6), -torch.arange(1.0, 6)],
    ids=["zero", "same", "parallel", "opposite"],
)
def test_slerp_without_an_arc_is_linear(two):
    one = torch.arange(1.0, 6)
    merged, counts = slerp([one, two], None, (0.25, 0.75), 1)
    assert counts == {"num_linear": 1}
    torch.testing.assert_close(merged, 0.25 * one + 0.75 * two)


def test_slerp_meets_linear_where_it_gives_way_to_it():
    one = draw(1000, 0)
    for scale in (0.5, 2.0):
        two = one + scale * methods.PARALLEL * one.norm() * torch.nn.functional.normalize(draw(1000, 1), dim=0)
        merged, counts = slerp([one, two], None, (0.5, 0.5), 1)
        assert counts == {"num_linear": int(scale < 1)}
        torch.testing.assert_close(merged, linear([one, two], None, (0.5, 0.5), 1)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # differences kept: 4 -3 1 . .  and  -1 -5 2 . .
        ((0.5, 0.5), [1 + 4, 1 - 4, 1 + 1.5, 1, 1]),
        ((0.75, 0.25), [1 + 4, 1 - 3.5, 1 + 1.25, 1, 1]),
        ((0.1, 0.9), [1 - 1, 1 - 4.8, 1 + 1.9, 1, 1]),  # the first entry's sign is now the second one's
        ((1.0, 0.0), [1 + 4, 1 - 3, 1 + 1, 1, 1]),
        ((0.2, 0.8), [1, 1 - 4.6, 1 + 1.8, 1, 1]),  # the first entry's masses cancel
    ],
)
def test_ties_by_hand(weights, expected):
    base = torch.ones(5)
    sources = [base + torch.tensor([4, -3, 1, 0.5, 0]), base + torch.tensor([-1, -5, 2, 0.25, 0])]
    merged, counts = ties(sources, base, weights, 0.6)
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float32))
    assert counts == {"num_kept": 6, "num_conflicts": 1}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_equals_a_naive_one(chunk, size, density, dtype):
    base = draw(size, 9, dtype)
    sources = [base + (0.1 * draw(size, seed)).to(dtype) for seed in range(3)]  # in bf16 many differences are alike
    weights = (0.5, 0.3, 0.2)
    merged, counts = ties(sources, base, weights, density)
    assert merged.dtype == dtype
    expected = naive_ties(sources, base, weights, density)
    torch.testing.assert_close(merged, expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)
    if dtype == torch.float32:
        assert counts["num_kept"] == 3 * max(1, round(density * size))


def test_ties_with_few_differences_keeps_no_zeros():
    base = draw(100, 0)
    one, two = base.clone(), base.clone()
    one[3] += 1
    merged, counts = ties([one, two], base, (0.5, 0.5), 0.5)
    assert counts == {"num_kept": 1, "num_conflicts": 0}
    torch.testing.assert_close(merged, one)  # not halved: the second one has no say on this entry


def test_half_precision_is_computed_in_fp32():
    one, two = torch.full((3,), 1.0, dtype=torch.bfloat16), torch.full((3,), 1.0 + 2**-7, dtype=torch.bfloat16)
    # 1 + 0.4 x 2^-7 rounds down, 1 + 0.6 x 2^-7 up; products rounded to bf16 on the way would not know.
    assert torch.equal(linear([one, two], None, (0.6, 0.4), 1)[0], one)
    assert torch.equal(linear([one, two], None, (0.4, 0.6), 1)[0], two)


def test_every_method_names_its_paper_and_goes_by_the_first_dtype():
    for method in METHODS.values():
        assert method.paper
        one, two = draw(10, 0, torch.bfloat16), draw(10, 1)
        base = draw(10, 2) if method.needs_base else None
        merged, _ = method.combine([one, two], base, (0.5, 0.5), 0.5)
        assert merged.dtype == torch.bfloat16

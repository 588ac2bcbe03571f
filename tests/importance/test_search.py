"""The search over layouts finds what brute force finds, refuses what does not compare, and is honest about its lead."""

import itertools
import random

import pytest

from hybridize.importance import LayerOrder, Ranking, load_search, save_search, search_layout
from hybridize.importance.search import Search, frontier, kv_groups, lead
from hybridize.importance.search_rankings import increases_of
from hybridize.spec.mixers import GatedDeltaNetSpec, IdentitySpec, Mamba1Spec, Mamba2Spec, SlidingWindowSpec

MIXERS = (Mamba1Spec(), GatedDeltaNetSpec(), SlidingWindowSpec(window=8))


def draw_problem(seed, num_layers=5, num_mixers=3):
    """Increases, some of them negative, and a cost that does not add up over the layers."""
    rng = random.Random(seed)
    increases = [[rng.gauss(0.2, 0.3) for _ in range(num_layers)] for _ in range(num_mixers)]
    prices = [5.0, *(rng.uniform(0.5, 6) for _ in range(num_mixers))]

    def cost(counts):
        return sum(n * price for n, price in zip(counts, prices, strict=True)) ** 1.3 + 0.7 * sum(n > 0 for n in counts)

    return increases, cost


def every_layout(increases, cost, mixers):
    """(loss, cost, replaced, groups) of all layouts, written down anew."""
    for choice in itertools.product(range(len(increases) + 1), repeat=len(increases[0])):
        counts = [choice.count(kind) for kind in range(len(increases) + 1)]
        loss = sum(increases[kind - 1][layer] for layer, kind in enumerate(choice) if kind)
        yield loss, cost(counts), len(choice) - counts[0], kv_groups(counts, mixers)


@pytest.mark.parametrize("seed", range(12))
def test_search_finds_what_brute_force_finds(seed):
    increases, cost = draw_problem(seed)
    search = Search(MIXERS, increases, cost)
    everything = list(every_layout(increases, cost, MIXERS))
    assert search.exact
    assert len(search.points) == len({tuple(p.choice.count(k) for k in range(4)) for p in search.points}) == 56
    for limit in [entry[1] for entry in random.Random(seed).sample(everything, 20)]:
        best = min(loss for loss, price, *_ in everything if price <= limit)
        found = search.choose(max_cost=limit)
        assert found.loss == pytest.approx(best)
        assert found.cost <= limit * (1 + 1e-9)
    for count in range(6):
        best = min(loss for loss, _, replaced, _ in everything if replaced == count)
        assert search.choose(num_layers=count).loss == pytest.approx(best)
    for a, b in itertools.pairwise(frontier(search.points)):
        assert a.cost < b.cost
        assert a.loss > b.loss


@pytest.mark.parametrize("seed", range(4))
def test_limited_groups_are_a_constraint_like_any_other(seed):
    increases, cost = draw_problem(seed)
    everything = [e for e in every_layout(increases, cost, MIXERS) if e[3] <= 2]
    search = Search(MIXERS, increases, cost, max_groups=2)
    for count in range(1, 6):
        losses = [loss for loss, _, replaced, _ in everything if replaced == count]
        best = search.choose(num_layers=count)
        assert (best.loss if best else None) == (pytest.approx(min(losses)) if losses else None)
    assert search.choose(num_layers=1) is search.choose(num_layers=3) is None, (
        "one layer of a kind makes five groups, and three of five three"
    )
    assert search.choose(num_layers=5) is not None


@pytest.mark.parametrize("seed", range(8))
def test_greedy_search_is_never_worse_than_one_mixer_alone_and_knows_what_it_is(seed):
    increases, cost = draw_problem(seed, num_layers=9)
    greedy = Search(MIXERS, increases, cost, exact_cells=0)
    exact = Search(MIXERS, increases, cost)
    assert (greedy.exact, exact.exact) == (False, True)
    for mixer in range(3):
        alone = frontier(greedy.single(mixer))
        assert min(lead(greedy.points, alone)) >= 0
        assert min(lead(exact.points, alone)) >= -1e-12
    assert min(lead(exact.points, frontier(greedy.points))) >= -1e-12
    for point in greedy.points:
        assert point == greedy.point(point.choice)


def test_greedy_search_finds_the_whole_frontier_of_a_single_mixer():
    increases, _ = draw_problem(0, num_layers=12, num_mixers=1)
    cost = lambda counts: 10.0 * counts[0] + counts[1]  # noqa: E731
    greedy = Search(MIXERS[:1], increases, cost, exact_cells=0)
    exact = Search(MIXERS[:1], increases, cost)
    assert [p.loss for p in frontier(greedy.points)] == pytest.approx([p.loss for p in frontier(exact.points)])


def test_search_of_a_large_model_is_exact_and_quick_with_three_mixers():
    increases, _ = draw_problem(1, num_layers=50)
    search = Search(MIXERS, increases, lambda counts: 10.0 * counts[0] + counts[1] + 2 * counts[2] + 3 * counts[3])
    assert search.exact
    # Without a limit every layer takes what is best for it.
    best = sum(min(0.0, *(row[layer] for row in increases)) for layer in range(50))
    assert search.choose().loss == pytest.approx(best)


@pytest.mark.parametrize(
    ("counts", "groups"),
    [((10, 40, 0, 0), 5), ((3, 45, 0, 0), 16), ((16, 0, 0, 0), 1), ((6, 5, 2, 3), 6), ((8, 4, 4, 0), 2)],
)
def test_groups_are_those_that_the_serving_page_names(counts, groups):
    # The fourth: 6 attention, 7 with a state, 3 windows: groups of 3, 2 + 3 + 1.
    assert kv_groups(counts, MIXERS) == groups


def test_layers_that_keep_nothing_make_no_group():
    assert kv_groups((4, 3), (IdentitySpec(),)) == 1


def ranking(mixer, scores, **changes):
    layers = tuple(range(len(scores)))
    fields = {
        "method": "mmr",
        "layers": layers,
        "order": tuple(sorted(layers, key=lambda layer: (scores[layer], layer))),
        "num_layers": len(scores),
        "mixer": mixer,
        "scores": dict(enumerate(scores)),
        "before": None,
        "settings": {"steps": 3, "seed": 0, "heldout_rows": 8, "init": "aligned", "learning_rate": 1e-3},
        "cost": {},
        "controls": {
            "uniform": LayerOrder("uniform", layers, None),
            "random": LayerOrder("random", layers, layers),
        },
    }
    return Ranking(**fields | changes)


M1 = Mamba1Spec(d_inner=64, d_xb=32, dt_rank=4)
PAIR = {"one": ranking(M1, [0.1, 0.4, 0.3]), "two": ranking(Mamba2Spec(), [0.2, 0.12, 0.35])}


def price(counts):
    return 10.0 * counts[0] + sum(counts[1:])


def found(rankings=PAIR, **target):
    return search_layout(rankings, price, cost_unit="apples", **{"num_layers": 2} | target)


def test_search_takes_each_mixer_where_it_costs_least():
    result = found()
    assert result.chosen.layout == "m2a"
    assert result.chosen.loss == pytest.approx(0.22)
    assert result.chosen.speedup == pytest.approx(30 / 12)
    assert [f.layout for f in result.frontier] == ["m2m", "m2a", "maa", "aaa"]
    assert [f.layout for f in result.controls["m"]] == ["aaa", "maa", "mam", "mmm"]
    assert [f.layout for f in result.controls["2/uniform"]] == ["aaa", "a2a", "2a2", "222"]
    # With two layers, mamba1 alone loses 0.4, mamba2 alone 0.32, the mixture 0.22.
    assert result.leads["m"] == pytest.approx((0.28, 0.18, 0.0, 0.0))
    assert result.leads["any"] == pytest.approx((0.15, 0.1, 0.0, 0.0))
    assert "beat the best single mixer at 2 of 4 costs, by up to 0.15 nat/token" in result.verdict


def test_search_says_when_mixing_gains_nothing():
    rankings = PAIR | {"two": ranking(Mamba2Spec(), [0.5, 0.5, 0.5])}
    assert found(rankings).verdict == "No mixture is predicted to beat the best single mixer at any of 4 costs."


def test_layers_better_off_replaced_are_replaced_without_being_asked_for():
    scores = [2.0, 2.5, 1.9]
    result = found({"one": ranking(M1, scores, method="perplexity", baseline=2.1)}, num_layers=None, speedup=1)
    assert result.chosen.layout == "mam"
    assert result.chosen.loss == pytest.approx(-0.3)
    assert result.frontier[-1].layout == "mam", "nothing replaced loses to it in both"


def test_a_result_survives_its_file_with_its_layout(tmp_path):
    wide = Mamba1Spec(d_inner=64, d_xb=32, dt_rank=4, state_size=32)
    result = found(PAIR | {"wide": ranking(wide, [9, 9, 0])}, num_layers=3)
    assert result.chosen.layout == "m2b"
    again = load_search(save_search(result, tmp_path / "search.json"))
    assert again == result
    assert again.layout.layers[2] == wide
    assert [spec.type for spec in again.layout.layers] == ["mamba1", "mamba2", "mamba1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "loo"}, r"^two: method loo does not say what the loss is when a layer becomes mamba2; rank by mmr"),
        ({"method": "perplexity"}, r"^two: its method is perplexity, but that of one is mmr; rank both alike"),
        ({"unit": "accuracy lost"}, r"^two: its unit is accuracy lost, but that of one is nat/token"),
        ({"num_layers": 9}, r"^two: it ranks 3 of 9 layers, those that a hybrid has left; rank the teacher"),
        ({"mixer": M1}, r"^two: it ranks for the same mamba1 as one; leave one out"),
        (
            {"settings": {"steps": 3, "seed": 0, "heldout_rows": 4, "init": "aligned"}},
            r"^two: its heldout_rows is 4, but that of one is 8.*rank again with heldout_rows: 8",
        ),
        (
            {"settings": {"steps": 3, "seed": 0, "heldout_rows": 8, "init": "neutral"}},
            r"^two: its init is neutral, but that of one is aligned",
        ),
    ],
)
def test_rankings_that_do_not_compare_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        increases_of(PAIR | {"two": ranking(**{"mixer": Mamba2Spec(), "scores": [1, 2, 3]} | change)})


def test_another_baseline_means_other_rows():
    pair = {
        name: ranking(mixer, [2.0, 3.0], method="perplexity", baseline=baseline)
        for name, mixer, baseline in (("one", M1, 1.5), ("two", Mamba2Spec(), 1.6))
    }
    with pytest.raises(ValueError, match=r"^two: the loss of the untouched model is 1\.6, but 1\.5 in one"):
        increases_of(pair)
    with pytest.raises(ValueError, match=r"^rankings: none is given"):
        increases_of({})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"speedup": 11, "num_layers": None}, r"^speedup: 11 is out of reach; the most is 10$"),
        ({"speedup": 3}, r"^speedup: 3 is out of reach with 2 layers replaced; the most is 2\.5$"),
        ({"num_layers": 4}, r"^num_layers: 4 is out of range; the model has 3 layers$"),
        (
            {"max_groups": 1},
            r"^num_layers: no layout has 2 layers replaced in at most 1 groups; use another number, or more groups$",
        ),
    ],
)
def test_a_target_out_of_reach_is_named_with_what_is_in_reach(target, message):
    with pytest.raises(ValueError, match=message):
        found(**target)


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "search.json"
    with pytest.raises(ValueError, match=r"search\.json: cannot be read"):
        load_search(file)
    for text, message in (
        ("{", "is not JSON"),
        ("{}", "format: None is not"),
        ('{"format": "hybridize.search/1"}', "damaged"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"search\.json: .*{message}.*run the search again"):
            load_search(file)

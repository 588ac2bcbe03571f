import copy
import json
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_example import LENGTH, build_teacher, draw_batch, rank_stage, ranking_of
from transformers.models.llama.modeling_llama import LlamaMLP

from hybridize.importance import (
    METHODS,
    LayerOrder,
    Ranking,
    load_ranking,
    rank_cost,
    rank_layers,
    save_ranking,
)
from hybridize.spec import AttentionSpec, IdentitySpec, LayoutSpec, Mamba1Spec, SlidingWindowSpec
from hybridize.spec.stages import RankStage
from hybridize.transfer import convert
from tiny_families import NUM_LAYERS


def test_the_least_important_layers_are_chosen_and_equals_from_below():
    ranking = ranking_of()
    assert ranking.order == (1, 3, 0, 5)
    assert [ranking.choose(num) for num in (1, 2, 3, 4)] == [(1,), (1, 3), (0, 1, 3), (0, 1, 3, 5)]


@settings(deadline=None, derandomize=True)
@given(num_layers=st.integers(1, 60), num=st.integers(1, 60), seed=st.integers(0, 3))
def test_every_choice_has_the_number_asked_for_and_ascends(num_layers, num, seed):
    layers = tuple(range(num_layers))
    for method in ("uniform", "random"):
        request = SimpleNamespace(layers=layers, stage=rank_stage(seed=seed))
        order = LayerOrder(method, layers, METHODS[method].function(request).order)
        if num > num_layers:
            with pytest.raises(ValueError, match=rf"num_layers: {num} .* use 1\.\.{num_layers}$"):
                order.choose(num)
            continue
        chosen = order.choose(num)
        assert len(set(chosen)) == num
        assert set(chosen) <= set(layers)
        assert list(chosen) == sorted(chosen)
        if method == "uniform":
            gaps = {after - before for before, after in pairwise(chosen)}
            assert not gaps or max(gaps) - min(gaps) <= 1
            assert abs(chosen[0] - (num_layers - 1 - chosen[-1])) <= 1
        elif num > 1:
            assert set(order.choose(num - 1)) <= set(chosen)


def test_uniform_is_evenly_spaced():
    order = LayerOrder("uniform", tuple(range(12)), None)
    assert order.choose(4) == (1, 4, 7, 10)
    assert order.choose(6) == (1, 3, 5, 7, 9, 11)
    assert order.choose(1) == (6,)
    assert order.choose(12) == tuple(range(12))
    assert LayerOrder("uniform", (2, 5, 8, 9), None).choose(2) == (5, 9)


@pytest.mark.parametrize("num", [0, -1, 5])
def test_a_number_out_of_range_is_named(num):
    with pytest.raises(ValueError, match=rf"stages\[1\]\.num_layers: {num} .*4 layers are ranked, use 1\.\.4"):
        ranking_of().choose(num, "recipe.stages[1].num_layers")


def test_controls_are_always_there_and_look_at_no_model(tmp_path):
    teacher = build_teacher()
    orders = {}
    for method in ("uniform", "random"):
        stage = rank_stage(method=method, seed=7)
        ranking = rank_layers(teacher, teacher, (), (), stage, state_dir=tmp_path / "none")
        assert set(ranking.controls) == {"uniform", "random"}
        assert ranking.scores is None
        assert ranking.before is None
        assert ranking.cost["tokens"] == 0
        assert ranking.order == ranking.controls[method].order
        orders[method] = ranking.order
        assert Ranking.from_dict(json.loads(json.dumps(ranking.as_dict()))) == ranking
    assert orders["uniform"] is None
    assert sorted(orders["random"]) == list(range(NUM_LAYERS))
    assert not (tmp_path / "none").exists()


def test_random_orders_depend_on_the_seed_alone():
    layers = tuple(range(24))

    def order(seed):
        request = SimpleNamespace(layers=layers, stage=rank_stage(seed=seed))
        return METHODS["random"].function(request).order

    assert order(0) == order(0)
    assert len({order(seed) for seed in range(8)}) == 8


def test_the_table_has_a_row_for_every_method_of_the_stage():
    methods = RankStage.model_fields["method"].annotation.__args__
    assert set(METHODS) == set(methods)
    assert {name for name, row in METHODS.items() if row.is_control} == {"uniform", "random"}
    assert "2511.02651" in METHODS["mmr"].paper


def test_attention_is_no_mixer_to_swap_in(tmp_path):
    teacher = build_teacher()
    with pytest.raises(ValueError, match=r"mixer: .*use mamba1"):
        rank_layers(teacher, teacher, (), (), rank_stage(mixer=AttentionSpec()), state_dir=tmp_path)


@pytest.mark.parametrize("method", ["mmr", "kl"])
@pytest.mark.parametrize("mixer", [IdentitySpec(), SlidingWindowSpec(window=4)])
def test_what_has_nothing_to_train_is_not_swapped_in_for_training(tmp_path, method, mixer):
    teacher = build_teacher()
    with pytest.raises(ValueError, match=f"mixer: {method} trains what it swaps in, and {mixer.type} has nothing new"):
        rank_layers(teacher, teacher, (), (), rank_stage(method=method, mixer=mixer), state_dir=tmp_path)


def test_a_file_gives_back_what_was_written(tmp_path):
    ranking = ranking_of()
    path = save_ranking(ranking, tmp_path / "deep" / "ranking.json")
    assert load_ranking(path) == ranking
    assert json.loads(path.read_text())["format"] == "hybridize.ranking/1"
    assert [file.name for file in path.parent.iterdir()] == ["ranking.json"]


def changed(change):
    value = copy.deepcopy(ranking_of().as_dict())
    change(value)
    return value


BROKEN = {
    "format": (lambda v: v.update(format="hybridize.report/1"), r"format: 'hybridize.report/1' is not"),
    "no format": (lambda v: v.pop("format"), r"format: None is not"),
    "missing": (lambda v: v.pop("num_layers"), r"num_layers: required, but missing; run"),
    "kind": (lambda v: v.update(num_layers="6"), r"num_layers: '6' is no int; run"),
    "layers": (lambda v: v.update(layers=[0, "x"]), r"layers: \[0, 'x'\] are not layer numbers"),
    "outside": (lambda v: v.update(num_layers=5), r"layers: \[0, 1, 3, 5\] are not layers of a model of 5"),
    "twice": (lambda v: v.update(order=[1, 3, 3, 5]), r"order: \[1, 3, 3, 5\] does not name each"),
    "unsorted": (lambda v: v.update(order=[3, 1, 0, 5]), r"order: .* does not ascend in score"),
    "score": (lambda v: v["scores"].pop("3"), r"scores: given for layers \[0, 1, 5\], not for"),
    "word": (lambda v: v["scores"].update({"3": "low"}), r"could not convert|scores: "),
    "null": (lambda v: v["scores"].update({"3": None}), r"scores: not a number for every layer"),
    "nan": (
        lambda v: v["scores"].update({"3": float("nan")}),
        r"scores: not a finite number for layers \[3\]",
    ),
    "control": (
        lambda v: v["controls"].pop("uniform"),
        r"controls: 'uniform' is missing; .*never shown alone",
    ),
    "foreign": (
        lambda v: v["controls"]["random"].update(layers=[0, 1], order=[1, 0]),
        r"controls\.random\.layers: they differ",
    ),
    "mixer": (lambda v: v["mixer"].update(type="mamba9"), r"mixer\.type: 'mamba9' is unknown"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_named_with_field_and_remedy(tmp_path, fault):
    change, message = BROKEN[fault]
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps(changed(change)))
    with pytest.raises(ValueError, match=message) as caught:
        load_ranking(path)
    assert str(caught.value).startswith(f"ranking {path}: ")


def test_a_file_that_is_no_ranking_at_all_is_named(tmp_path):
    path = tmp_path / "ranking.json"
    with pytest.raises(ValueError, match=r"ranking\.json: cannot be read .*; check the path"):
        load_ranking(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"ranking\.json: is not JSON"):
        load_ranking(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"ranking\.json: list instead of a mapping"):
        load_ranking(path)


def test_the_cost_is_known_beforehand():
    stage = rank_stage(steps=10, tokens_per_step=240)
    cost = rank_cost(4, stage)
    assert cost["tokens_per_layer"] == 2400
    assert cost["tokens"] == 9600
    assert cost["layer_passes"] == 10 * (4 + 3 + (4 + 3 + 2 + 1))
    assert cost["layer_passes_cheap"] == cost["layer_passes"]
    assert cost["layer_passes_plain"] == 10 * 4 * (4 + 4)
    plain = rank_cost(4, rank_stage(steps=10, tokens_per_step=240, sweep="plain"))
    assert plain["layer_passes"] == cost["layer_passes_plain"]
    assert plain["layer_passes_cheap"] == cost["layer_passes_cheap"]
    assert rank_cost(4, stage, layers=(1, 3))["tokens"] == 4800
    assert set(rank_cost(4, rank_stage(method="uniform")).values()) == {0}


def test_planning_needs_no_torch():
    code = "import sys, hybridize.importance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


EVERY_METHOD = {
    "mmr": {},
    "mmr plain": {"method": "mmr", "sweep": "plain", "learning_rate": 1e-3},
    "loo": {"method": "loo"},
    "loo block": {"method": "loo", "identity": "block"},
    "perplexity": {"method": "perplexity"},
    "window": {"method": "window", "window": 3},
    "kl": {"method": "kl"},
    "uniform": {"method": "uniform"},
    "random": {"method": "random"},
}


@pytest.mark.parametrize("replaced", [(), (0, 3)], ids=["teacher", "hybrid"])
@pytest.mark.parametrize("name", EVERY_METHOD)
def test_the_cost_told_beforehand_is_what_is_run(name, replaced, monkeypatch, tmp_path):
    """Every decoder layer has one MLP: its calls are counted, and the tokens they see."""
    stage = rank_stage(tokens_per_step=2 * LENGTH, heldout_rows=3, **EVERY_METHOD[name])
    batches = [draw_batch(seed) for seed in range(stage.steps)]
    heldout = [draw_batch(100 + row, rows=1) for row in range(stage.heldout_rows)]
    teacher = build_teacher("llama")
    layout = LayoutSpec.replace(NUM_LAYERS, replaced, Mamba1Spec(state_size=4))
    model = convert(teacher, layout)[0].requires_grad_(False) if replaced else teacher
    seen = []
    honest = LlamaMLP.forward

    def spy(self, x):
        seen.append(x.shape[0])
        return honest(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", spy)
    ranking = rank_layers(model, teacher, batches, heldout, stage, state_dir=tmp_path)
    cost = rank_cost(NUM_LAYERS, stage, ranking.layers)
    without_mlp = stage.heldout_rows * len(ranking.layers) if name == "loo block" else 0
    assert seen.count(2) == cost["layer_passes"]
    assert seen.count(1) == cost["scoring_passes"] * stage.heldout_rows - without_mlp
    assert ranking.cost["tokens"] == cost["tokens"]
    assert ranking.cost["tokens_scored"] == cost["tokens_scored"]
    assert {**ranking.cost, "seconds": 0} == cost | {"seconds": 0}
    assert load_ranking(save_ranking(ranking, tmp_path / "ranking.json")) == ranking
    assert (ranking.before is not None) == name.startswith("mmr")
    assert (ranking.baseline is not None) == (not METHODS[stage.method].is_control and stage.method != "mmr")
    assert ranking.unit == METHODS[stage.method].unit


def test_a_layer_of_either_end_ranked_alone_costs_what_is_above_it():
    stage = rank_stage(steps=1)
    low, high = (rank_cost(4, stage, [layer])["layer_passes"] for layer in (0, 3))
    assert (low, high) == (4 + 0 + 4, 4 + 3 + 1)
    assert rank_cost(4, rank_stage(method="loo", score="world", problems_per_task=5))["answers"] == 5 * 4 * 5
    assert set(rank_cost(4, stage, []).values()) == {0}

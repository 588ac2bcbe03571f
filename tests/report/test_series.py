"""Series, and what tells rankings apart, are found from the recipe as written."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridize.pipeline import collecting
from hybridize.pipeline.artifacts import Artifact
from hybridize.spec.expansion import expand
from hybridize.spec.recipe import load_recipe
from hybridize.spec.stages import ConvertStage, DistillStage, FitStage, RankStage

RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_series_is_a_schedules_stages_under_its_label_or_name():
    written = load_recipe(RECIPES / "study-h1.yaml")
    series = collecting.series_of(written, 16)
    stages = {s.name for s in expand(written, 16).stages if isinstance(s, RankStage | ConvertStage | DistillStage)}
    for start, name in (("h1-", "Mamba-1"), ("gdn-", "gated delta net")):
        mine = {stage for stage in stages if stage.startswith(start)}
        assert len(mine) == 18
        assert {stage for stage, found in series.items() if found == name} >= mine
    assert not {stage for stage in stages if stage in series and not stage.startswith(("h1-", "gdn-"))}


def test_a_fit_of_a_schedule_is_in_its_series():
    written = load_recipe(RECIPES / "pocket-h1.yaml")
    fits = [stage.name for stage in expand(written, 16).stages if isinstance(stage, FitStage)]
    assert [collecting.series_of(written, 16)[name] for name in fits] == ["h1"]
    assert collecting.series_of(load_recipe(RECIPES / "demo.yaml"), 16) == {}


def test_schedules_that_share_a_label_go_by_their_names():
    written = load_recipe(RECIPES / "study-h1.yaml")
    alike = [stage.model_copy(update={"label": "x"}) if stage.kind == "schedule" else stage for stage in written.stages]
    series = collecting.series_of(written.model_copy(update={"stages": tuple(alike)}), 16)
    assert set(series.values()) == {"h1", "gdn"}


def rankings(recipe, monkeypatch):
    """What the report shows of a recipe's rankings, had it run: each orders layers from the last."""
    written = load_recipe(RECIPES / recipe)
    stages = expand(written, 16).stages
    layouts = {"teacher": ["attention"] * 16}
    artifacts = {}
    for stage in stages:
        if isinstance(stage, ConvertStage) and not stage.search:
            layout = list(layouts[stage.model])
            left = [layer for layer in range(16) if layout[layer] == "attention"]
            for layer in left[len(left) - stage.num_layers :]:
                layout[layer] = stage.mixer.type
            layouts[stage.name] = layout
            artifacts[stage.name] = Artifact(Path(stage.name), {"metrics": {"layout": layout}})
        elif isinstance(stage, DistillStage | FitStage):
            layouts[stage.name] = layouts.get(stage.model)
        elif isinstance(stage, RankStage):
            artifacts[stage.name] = Artifact(Path(stage.name), {"metrics": {}})
    methods = {stage.name: stage.method for stage in stages if isinstance(stage, RankStage)}

    def rule(method, controls):
        order = tuple(reversed(range(16)))
        return SimpleNamespace(
            method=method,
            order=order,
            scores=dict(enumerate(range(16))),
            before=None,
            unit="nat/token",
            num_layers=16,
            choose=lambda count: order[:count],
            controls={name: rule(name, ()) for name in controls},
        )

    monkeypatch.setattr(collecting, "load_ranking", lambda path: rule(methods[path.parent.name], ("uniform", "random")))
    study = collecting._Study(expand(written, 16), 16, artifacts, {}, collecting.series_of(written, 16))
    return study._rankings()


def test_rankings_of_a_study_have_titles_of_their_own(monkeypatch):
    found = rankings("study-h1.yaml", monkeypatch)
    titles = [entry.title for entry in found]
    assert len(set(titles)) == len(titles)
    assert {
        "Mamba-1, 8 of 16 layers: loo",
        "Mamba-1, 10 of 16 layers: mmr",
        "gated delta net, 10 of 16 layers: mmr",
        "gated delta net, 10 of 16 layers: uniform",
        "10 of 16 layers: mmr, mamba1, aligned",
        "10 of 16 layers: mmr, gated delta net, neutral",
        "10 of 16 layers: loo",
        "10 of 16 layers: random",
    } <= set(titles)
    assert {entry.series for entry in found} == {"Mamba-1", "gated delta net", ""}


@pytest.mark.parametrize(
    ("recipe", "titles"),
    [
        ("demo.yaml", ["8 of 16 layers: mmr", "8 of 16 layers: random", "8 of 16 layers: uniform"]),
        ("pocket-h1.yaml", ["loo", "uniform", "random", "8 of 16 layers: mmr", "8 of 16 layers: uniform"]),
    ],
)
def test_titles_of_a_small_run_are_short(recipe, titles, monkeypatch):
    assert [entry.title for entry in rankings(recipe, monkeypatch)][: len(titles)] == titles

"""LOO, perplexity and window: the cheap sweep measures what whole models would, and goes on after a kill."""

import math

import pytest
import torch
from ranking_example import build_teacher, draw_batch, rank_stage
from torch.nn.functional import cross_entropy

from hybridize.importance import rank_layers, untrained
from hybridize.importance.changes import left_out, windowed
from hybridize.models import attention_module, layout_of
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.spec.base import StoppedError
from hybridize.transfer import convert
from tiny_families import NUM_LAYERS
from tiny_families import build_teacher as build_family

MIXER = Mamba1Spec(state_size=4)
METHODS = ({"method": "loo"}, {"method": "loo", "identity": "block"}, {"method": "perplexity"}, {"method": "window"})


def stage_of(**changes):
    return rank_stage(**{"window": 3} | changes)


def plain_loss(model, heldout):
    """Whole models, whole logits: nat per completion token."""
    total = count = 0
    for batch in heldout:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        valid = batch["valid"][:, :-1]
        total += float(cross_entropy(logits[valid], batch["input_ids"][:, 1:][valid], reduction="sum"))
        count += int(valid.sum())
    return total / count


def plain_score(model, layer, stage, heldout):
    if stage.method == "perplexity":
        return plain_loss(convert(model, layout_of(model.config).with_replaced([layer], MIXER))[0], heldout)
    change = (
        windowed(model, layer, stage.window) if stage.method == "window" else left_out(model, layer, stage.identity)
    )
    with change:
        return plain_loss(model, heldout)


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: "-".join(settings.values()))
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "gpt_neox"])
def test_scores_are_the_losses_of_whole_models(model_type, settings, heldout, tmp_path):
    """Gemma bounds its logits, Granite divides them, GPT-NeoX names everything differently."""
    teacher, stage = build_family(model_type), stage_of(**settings)
    ranking = rank_layers(teacher, teacher, (), heldout, stage, state_dir=tmp_path)
    assert ranking.unit == "nat/token"
    assert ranking.before is None
    assert ranking.baseline == pytest.approx(plain_loss(teacher, heldout), rel=1e-5)
    for layer in range(NUM_LAYERS):
        assert ranking.scores[layer] == pytest.approx(plain_score(teacher, layer, stage, heldout), rel=1e-4)
        assert abs(ranking.scores[layer] - ranking.baseline) > 1e-4
    assert ranking.cost["tokens"] == 0
    assert ranking.cost["tokens_scored"] == (NUM_LAYERS + 1) * sum(b["valid"].numel() for b in heldout)


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: "-".join(settings.values()))
def test_only_attention_left_in_a_hybrid_is_ranked_and_the_models_are_left_alone(settings, heldout, tmp_path):
    teacher, stage = build_teacher("llama"), stage_of(**settings)
    hybrid, _ = convert(teacher, LayoutSpec.replace(NUM_LAYERS, [0, 2], MIXER))
    before = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    ranking = rank_layers(hybrid, teacher, (), heldout, stage, state_dir=tmp_path)
    assert ranking.layers == (1, 3)
    assert ranking.baseline == pytest.approx(plain_loss(hybrid, heldout), rel=1e-5)
    for layer in (1, 3):
        assert ranking.scores[layer] == pytest.approx(plain_score(hybrid, layer, stage, heldout), rel=1e-4)
    assert hybrid.config.layout.replaced == (0, 2)
    for name, tensor in hybrid.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("settings", METHODS[:1] + METHODS[2:], ids=lambda settings: settings["method"])
def test_attention_without_effect_leaves_the_baseline_exactly(settings, heldout, tmp_path):
    teacher = build_teacher("mistral", sliding_window=None)
    attention_module(teacher, 2).o_proj.weight.zero_()
    ranking = rank_layers(teacher, teacher, (), heldout, stage_of(**settings), state_dir=tmp_path)
    assert ranking.scores[2] == ranking.baseline
    assert ranking.scores[1] != ranking.baseline


def test_a_window_as_long_as_the_rows_is_the_baseline(heldout, tmp_path):
    teacher = build_teacher("llama")
    ranking = rank_layers(teacher, teacher, (), heldout, stage_of(method="window", window=24), state_dir=tmp_path)
    assert set(ranking.scores.values()) == {ranking.baseline}
    assert ranking.order == tuple(range(NUM_LAYERS))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: "-".join(settings.values()))
def test_resumed_equals_uninterrupted_and_measures_nothing_twice(settings, heldout, tmp_path, monkeypatch):
    teacher, stage = build_teacher("mistral"), stage_of(**settings)
    measured = []
    honest = untrained.measure

    def spy(heldout, loss_of, stage, layer):
        measured.append(layer)
        return honest(heldout, loss_of, stage, layer)

    monkeypatch.setattr(untrained, "measure", spy)

    def rank(folder, **options):
        return rank_layers(teacher, teacher, (), heldout, stage, state_dir=tmp_path / folder, **options)

    whole = rank("whole")
    assert measured == [-1, 0, 1, 2, 3]

    def kill(done, total):
        if done == 3:  # of layer 1, before it is written
            raise Killed

    with pytest.raises(Killed):
        rank("killed", on_progress=kill)
    measured.clear()
    progress = []
    resumed = rank("killed", on_progress=lambda done, total: progress.append((done, total)))
    assert measured == [1, 2, 3]
    assert progress == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert (resumed.scores, resumed.baseline, resumed.order) == (whole.scores, whole.baseline, whole.order)
    names = sorted(file.name for file in (tmp_path / "killed").iterdir())
    assert names == ["baseline.json", *(f"layer-{layer}.json" for layer in range(NUM_LAYERS))]


def test_results_of_another_method_or_setting_are_not_used(heldout, tmp_path):
    teacher = build_teacher("llama")
    seen = {}
    for settings in METHODS:
        ranking = rank_layers(teacher, teacher, (), heldout, stage_of(**settings), state_dir=tmp_path)
        assert tuple(ranking.scores.values()) not in seen
        seen[tuple(ranking.scores.values())] = settings


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: "-".join(settings.values()))
def test_a_loss_that_is_no_number_stops_and_names_the_place(settings, heldout, tmp_path):
    teacher, stage = build_teacher("llama"), stage_of(**settings)
    model = build_teacher("llama")
    attention_module(model, 1).v_proj.weight[0, 0] = float("inf")
    with pytest.raises(StoppedError, match=r"^baseline: the loss is nan on the held-out rows; check that") as caught:
        rank_layers(model, teacher, (), heldout, stage, state_dir=tmp_path)
    assert "learning_rate" not in str(caught.value)
    with pytest.raises(ValueError, match="heldout: it has no completion token"):
        rank_layers(teacher, teacher, (), [], stage, state_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_measured_in_half(heldout, tmp_path):
    exact, half = build_teacher("llama"), build_teacher("llama").to(torch.bfloat16)
    for settings in METHODS:
        stage = stage_of(**settings)
        rankings = [
            rank_layers(model, model, (), heldout, stage, state_dir=tmp_path / f"{settings}-{model.dtype}")
            for model in (exact, half)
        ]
        for layer in range(NUM_LAYERS):
            assert rankings[1].scores[layer] == pytest.approx(rankings[0].scores[layer], rel=0.05)


WORLD = {"method": "loo", "score": "world"}


def test_a_judge_scores_by_the_accuracy_that_a_layer_takes_with_it(tmp_path):
    teacher = build_teacher("llama")
    prompt = draw_batch(0)["input_ids"]
    answers, modes = [], []

    def judge(model):
        modes.append(model.training)
        answers.append(model.generate(prompt, max_new_tokens=6, do_sample=False)[:, prompt.shape[1] :])
        return float((answers[-1] == answers[0]).float().mean())

    teacher.train()
    ranking = rank_layers(teacher, teacher, (), (), stage_of(**WORLD), state_dir=tmp_path, judge=judge)
    assert teacher.training
    assert not any(modes)
    assert ranking.unit == "accuracy lost"
    assert ranking.baseline == 1.0
    assert len(answers) == NUM_LAYERS + 1
    teacher.eval()
    for layer in range(NUM_LAYERS):
        with left_out(teacher, layer, "mixer"):
            expected = teacher.generate(prompt, max_new_tokens=6, do_sample=False)[:, prompt.shape[1] :]
        assert torch.equal(answers[layer + 1], expected)
        assert ranking.scores[layer] == pytest.approx(1 - float((expected == answers[0]).float().mean()))
    assert max(ranking.scores.values()) > 0
    assert ranking.cost["answers"] == (NUM_LAYERS + 1) * 4 * 32


def test_a_judge_is_asked_for_and_asked_once(tmp_path):
    teacher, stage = build_teacher("llama"), stage_of(**WORLD)
    with pytest.raises(ValueError, match="judge: score 'world' needs a function"):
        rank_layers(teacher, teacher, (), (), stage, state_dir=tmp_path)
    said = iter((0.5, 0.25, 0.75, math.nan))
    with pytest.raises(StoppedError, match=r"^layer 2: the judge says nan; it must say which share is right"):
        rank_layers(teacher, teacher, (), (), stage, state_dir=tmp_path, judge=lambda _: next(said))
    said = iter((0.5, 0.0))
    ranking = rank_layers(teacher, teacher, (), (), stage, state_dir=tmp_path, judge=lambda _: next(said))
    assert ranking.scores == {0: 0.25, 1: -0.25, 2: 0.0, 3: 0.5}
    assert ranking.order == (1, 2, 0, 3)

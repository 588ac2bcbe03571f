import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_example import build_teacher, draw_batch, rank_stage

from hybridize.importance import mmr, rank_layers, rows
from hybridize.importance.decoder import run_layers, run_up_to
from hybridize.importance.rows import Rows
from hybridize.importance.steps import rate_at
from hybridize.losses.divergence import dense_divergence
from hybridize.models import attention_module, convert_model, layout_of
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.spec.base import StoppedError
from hybridize.transfer import convert, replace_layer
from tiny_families import NUM_LAYERS
from tiny_families import build_teacher as build_family

MIXER = Mamba1Spec(state_size=4)


def plain_loss(student, teacher, batch):
    """Whole models, whole logits, summed over the valid positions."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    valid = batch["valid"].flatten()
    logits = [model(**inputs, use_cache=False).logits.flatten(0, 1) for model in (student, teacher)]
    return dense_divergence(*logits, valid_T=valid, reduction="sum")


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_loss_and_gradients_are_those_of_the_whole_model(teacher, batches, layer, checkpoint):
    student = convert_model(teacher, layout_of(teacher.config), share=True).requires_grad_(False)
    kept = Rows(batches[0], torch.device("cpu"))
    kept.see_teacher(teacher)
    for stop in range(layer + 1):  # one layer at a time, as the sweep does
        kept.advance(student, stop)
    replace_layer(student, layer, MIXER)
    parameters = list(attention_module(student, layer).requires_grad_(True).parameters())

    loss = kept.divergence(student, teacher, checkpoint=checkpoint)
    expected = plain_loss(student, teacher, batches[0])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss, parameters)
    expected_gradients = torch.autograd.grad(expected, parameters)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_a_sweep_in_one_leap_equals_single_steps(teacher, batches):
    hidden = run_up_to(teacher, batches[1], 1)
    for layer in range(1, NUM_LAYERS - 1):
        hidden = run_up_to(teacher, batches[1], layer + 1, first=layer, hidden=hidden)
    assert torch.equal(hidden, run_up_to(teacher, batches[1], NUM_LAYERS - 1))
    whole = run_layers(teacher, batches[1])
    assert torch.equal(run_layers(teacher, batches[1], first=NUM_LAYERS - 1, hidden=hidden), whole)


def test_layers_work_as_before_after_a_partial_run_and_after_a_failure(teacher, batches):
    before = run_layers(teacher, batches[0])
    run_up_to(teacher, batches[0], 2)
    assert torch.equal(run_layers(teacher, batches[0]), before)
    with pytest.raises(AttributeError):
        run_layers(teacher, batches[0], first=2, hidden=None)
    assert torch.equal(run_layers(teacher, batches[0]), before)


def test_scores_equal_a_plain_training_of_each_layer(teacher, batches, heldout, stage, tmp_path):
    """The whole trial by whole models: same start, same steps, same held-out loss."""
    ranking = rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path)
    num_heldout = sum(int(batch["valid"].sum()) for batch in heldout)

    for layer in (0, NUM_LAYERS - 1):
        layout = LayoutSpec.replace(NUM_LAYERS, [layer], MIXER)
        student, _ = convert(teacher, layout, stage.init, stage.seed)
        student.requires_grad_(False)
        parameters = list(attention_module(student, layer).requires_grad_(True).parameters())

        def held_loss(student=student):
            with torch.no_grad():
                return sum(float(plain_loss(student, teacher, batch)) for batch in heldout) / num_heldout

        assert ranking.before[layer] == pytest.approx(held_loss(), rel=1e-5)
        optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = rate_at(step, stage)
            optimizer.zero_grad()
            (plain_loss(student, teacher, batch) / batch["valid"].sum()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        assert ranking.scores[layer] == pytest.approx(held_loss(), rel=1e-3)
        assert ranking.scores[layer] != ranking.before[layer]


def test_order_ascends_in_score_and_the_models_are_left_alone(teacher, batches, heldout, stage, tmp_path):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    ranking = rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path)
    assert sorted(ranking.order) == list(range(NUM_LAYERS))
    scores = [ranking.scores[layer] for layer in ranking.order]
    assert scores == sorted(scores)
    assert all(score > 0 for score in scores)
    assert ranking.cost["tokens"] == NUM_LAYERS * stage.steps * stage.tokens_per_step
    assert ranking.cost["seconds"] > 0
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not hasattr(teacher.config, "mixers")


def test_a_layer_without_effect_ranks_first(batches, heldout, tmp_path):
    teacher = build_teacher()
    attention_module(teacher, 2).o_proj.weight.zero_()
    ranking = rank_layers(teacher, teacher, batches, heldout, rank_stage(), state_dir=tmp_path)
    assert ranking.order[0] == 2
    assert ranking.before[2] == pytest.approx(0, abs=1e-6)
    assert ranking.choose(1) == (2,)


def test_only_the_attention_left_in_a_hybrid_is_ranked(teacher, batches, heldout, stage, tmp_path):
    hybrid, _ = convert(teacher, LayoutSpec.replace(NUM_LAYERS, [0, 2], MIXER))
    ranking = rank_layers(hybrid, teacher, batches, heldout, stage, state_dir=tmp_path)
    assert ranking.layers == (1, 3)
    assert set(ranking.scores) == {1, 3}
    assert ranking.num_layers == NUM_LAYERS
    assert all(control.layers == (1, 3) for control in ranking.controls.values())
    assert hybrid.config.layout.replaced == (0, 2)
    everything, _ = convert(teacher, LayoutSpec.replace(NUM_LAYERS, range(NUM_LAYERS), MIXER))
    with pytest.raises(ValueError, match="no layer of its layout mmmm is attention"):
        rank_layers(everything, teacher, batches, heldout, stage, state_dir=tmp_path)


class Killed(BaseException):
    pass


def test_resumed_equals_uninterrupted_and_trains_nothing_twice(batches, heldout, stage, tmp_path, monkeypatch):
    teacher = build_teacher()
    tried = []
    honest = mmr._try_layer

    def spy(request, student, layer, *rest):
        tried.append(layer)
        return honest(request, student, layer, *rest)

    monkeypatch.setattr(mmr, "_try_layer", spy)

    def rank(folder, **options):
        return rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path / folder, **options)

    whole = rank("whole")
    assert tried == [0, 1, 2, 3]

    def kill(done, total):
        if done == 2 * stage.steps + 1:  # in the middle of layer 2
            raise Killed

    with pytest.raises(Killed):
        rank("killed", on_progress=kill)
    tried.clear()
    progress = []
    resumed = rank("killed", on_progress=lambda done, total: progress.append((done, total)))
    assert tried == [2, 3]
    assert (resumed.scores, resumed.before, resumed.order) == (whole.scores, whole.before, whole.order)
    assert progress[0] == (2 * stage.steps, 4 * stage.steps)
    assert progress[-1] == (4 * stage.steps, 4 * stage.steps)
    assert len(progress) == 1 + 2 * stage.steps

    tried.clear()
    monkeypatch.setattr(rows, "run_layers", None)  # not a single forward
    again = rank("killed")
    assert tried == []
    assert again.scores == whole.scores
    assert again.cost["seconds"] > 0


@pytest.mark.parametrize("change", ["settings", "rows", "heldout", "teacher", "damage"])
def test_stale_and_damaged_results_are_not_used(batches, heldout, stage, tmp_path, change, monkeypatch):
    teacher = build_teacher()
    rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [f"layer-{layer}.json" for layer in range(NUM_LAYERS)]
    if change == "settings":
        stage = rank_stage(learning_rate=2e-2)
    elif change == "rows":
        batches[0]["input_ids"][0, 0] += 1
    elif change == "heldout":
        heldout = heldout[:1]
    elif change == "teacher":
        teacher.lm_head.weight.mul_(1.01)
    else:
        for file in tmp_path.iterdir():
            file.write_text(file.read_text()[:20])
    tried = []
    honest = mmr._try_layer
    monkeypatch.setattr(mmr, "_try_layer", lambda *args: (tried.append(args[2]), honest(*args))[1])
    rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path)
    assert tried == list(range(NUM_LAYERS))


def test_a_loss_that_is_no_number_stops_and_names_the_layer(batches, heldout, stage, tmp_path):
    teacher = build_teacher()
    model = build_teacher()
    attention_module(model, 1).v_proj.weight[0, 0] = float("inf")
    with pytest.raises(StoppedError, match=r"layer 0: the loss is nan .*; lower learning_rate \(now 0\.01\)"):
        rank_layers(model, teacher, batches, heldout, stage, state_dir=tmp_path)

    wild = rank_stage(learning_rate=1e30)
    with pytest.raises(StoppedError, match=r"layer 0: the loss is \w+ (at step|on the held-out)"):
        rank_layers(teacher, teacher, batches, heldout, wild, state_dir=tmp_path)
    assert not list(tmp_path.glob("*.json"))
    assert all(torch.isfinite(tensor).all() for tensor in teacher.state_dict().values())


def test_batches_must_fit_the_stage(batches, heldout, stage, tmp_path):
    teacher = build_teacher()
    with pytest.raises(ValueError, match="batches: 2 are given for 3 steps; give one for each step"):
        rank_layers(teacher, teacher, batches[:2], heldout, stage, state_dir=tmp_path)
    blank = {**heldout[0], "valid": torch.zeros_like(heldout[0]["valid"])}
    for empty in ([], [blank]):
        with pytest.raises(ValueError, match="heldout: it has no completion token"):
            rank_layers(teacher, teacher, batches, empty, stage, state_dir=tmp_path)


def test_a_half_precision_model_is_ranked_with_an_fp32_mixer(batches, heldout, stage, tmp_path):
    teacher = build_teacher().to(torch.bfloat16)
    exact = build_teacher()
    half = rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path / "half")
    full = rank_layers(exact, exact, batches, heldout, stage, state_dir=tmp_path / "full")
    for layer in half.layers:
        assert half.before[layer] == pytest.approx(full.before[layer], rel=0.2)
        assert half.scores[layer] == pytest.approx(full.scores[layer], rel=0.2)


@settings(deadline=None, derandomize=True)
@given(steps=st.integers(1, 500))
def test_the_rate_warms_up_then_falls_to_a_tenth(steps):
    stage = rank_stage(steps=steps, learning_rate=1.0)
    rates = [rate_at(step, stage) for step in range(steps)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0
    assert peak <= steps // 10 + 1


def test_state_files_say_what_they_are(batches, heldout, stage, tmp_path):
    teacher = build_teacher()
    ranking = rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path)
    state = json.loads((tmp_path / "layer-1.json").read_text())
    assert state["format"] == "hybridize.ranking-layer/2"
    assert (state["layer"], state["score"]) == (1, ranking.scores[1])
    assert state["tokens"] == stage.steps * stage.tokens_per_step
    assert draw_batch(0)["input_ids"].numel() == stage.tokens_per_step


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere2", "gpt_neox", "qwen3_moe"])
def test_every_familys_logits_are_its_own(model_type, batches, heldout, tmp_path):
    """Some scale or bound their logits; the divergence is that of the logits which the models give."""
    mixer = Mamba1Spec(state_size=8)  # as wide as a head, whose norms Qwen's mixers keep
    teacher, stage = build_family(model_type), rank_stage(mixer=mixer)
    ranking = rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path)
    num_heldout = sum(int(batch["valid"].sum()) for batch in heldout)
    for layer in (0, NUM_LAYERS - 1):
        student, _ = convert(teacher, LayoutSpec.replace(NUM_LAYERS, [layer], mixer))
        with torch.no_grad():
            expected = sum(float(plain_loss(student, teacher, batch)) for batch in heldout) / num_heldout
        assert ranking.before[layer] == pytest.approx(expected, rel=1e-4)

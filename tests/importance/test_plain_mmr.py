"""MMR by the paper's plain reading: whole students, all weights trained, nothing cached."""

import pytest
import torch
from ranking_example import build_teacher, rank_stage

from hybridize.importance import mmr, rank_layers
from hybridize.importance.steps import rate_at
from hybridize.losses.divergence import dense_divergence
from hybridize.models import layout_of
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.spec.base import StoppedError
from hybridize.transfer import convert
from tiny_families import NUM_LAYERS

MIXER = Mamba1Spec(state_size=4)


@pytest.fixture
def stage():
    return rank_stage(sweep="plain", learning_rate=2e-3)


def plain_loss(student, teacher, batches):
    total, count = 0.0, 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        valid = batch["valid"].flatten()
        logits = [model(**inputs, use_cache=False).logits.flatten(0, 1) for model in (student, teacher)]
        total = total + dense_divergence(*logits, valid_T=valid, reduction="sum")
        count += int(valid.sum())
    return total / count


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("replaced", [(), (0, 2)], ids=["teacher", "hybrid"])
def test_scores_are_those_of_whole_students_trained_plainly(
    teacher, replaced, batches, heldout, stage, tmp_path, checkpoint
):
    model = convert(teacher, LayoutSpec.replace(NUM_LAYERS, replaced, MIXER))[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranking = rank_layers(model, teacher, batches, heldout, stage, state_dir=tmp_path, checkpoint=checkpoint)
    assert ranking.layers == tuple(layer for layer in range(NUM_LAYERS) if layer not in replaced)
    for layer in (1, 3):
        student, _ = convert(model, layout_of(model.config).with_replaced([layer], MIXER))
        student.requires_grad_(True)
        with torch.no_grad():
            assert ranking.before[layer] == pytest.approx(float(plain_loss(student, teacher, heldout)), rel=1e-4)
        parameters = list(student.parameters())
        optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = rate_at(step, stage)
            optimizer.zero_grad()
            plain_loss(student, teacher, [batch]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        with torch.no_grad():
            assert ranking.scores[layer] == pytest.approx(float(plain_loss(student, teacher, heldout)), rel=1e-3)
        assert ranking.scores[layer] != pytest.approx(ranking.before[layer], rel=1e-2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in (*model.parameters(), *teacher.parameters()))


def test_before_training_both_sweeps_measure_the_same(batches, heldout, stage, tmp_path):
    teacher = build_teacher("mistral")
    plain = rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path / "plain")
    cheap = rank_layers(teacher, teacher, batches, heldout, rank_stage(), state_dir=tmp_path / "cheap")
    assert plain.before == pytest.approx(cheap.before, rel=1e-5)
    assert plain.cost["layer_passes_cheap"] == cheap.cost["layer_passes"] < plain.cost["layer_passes"]
    assert plain.cost["layer_passes"] == cheap.cost["layer_passes_plain"]


class Killed(BaseException):
    pass


def test_resumed_equals_uninterrupted_and_trains_nothing_twice(batches, heldout, stage, tmp_path, monkeypatch):
    teacher = build_teacher("llama")
    tried = []
    honest = mmr._try_plainly

    def spy(request, layer, *rest):
        tried.append(layer)
        return honest(request, layer, *rest)

    monkeypatch.setattr(mmr, "_try_plainly", spy)

    def rank(folder, **options):
        return rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path / folder, **options)

    whole = rank("whole")

    def kill(done, total):
        if done == 2 * stage.steps + 1:
            raise Killed

    with pytest.raises(Killed):
        rank("killed", on_progress=kill)
    tried.clear()
    resumed = rank("killed")
    assert tried == [2, 3]
    assert (resumed.scores, resumed.before, resumed.order) == (whole.scores, whole.before, whole.order)


def test_a_cheap_sweeps_results_are_not_taken_for_plain_ones(batches, heldout, stage, tmp_path):
    teacher = build_teacher("llama")
    cheap = rank_stage(learning_rate=stage.learning_rate)
    found = [
        rank_layers(teacher, teacher, batches, heldout, which, state_dir=tmp_path).scores for which in (cheap, stage)
    ]
    assert found[0] != found[1]


def test_half_precision_is_trained_in_fp32(batches, heldout, stage, tmp_path):
    half, exact = build_teacher("mistral").to(torch.bfloat16), build_teacher("mistral")
    rankings = [
        rank_layers(model, model, batches, heldout, stage, state_dir=tmp_path / str(model.dtype))
        for model in (half, exact)
    ]
    for layer in range(NUM_LAYERS):
        assert rankings[0].scores[layer] == pytest.approx(rankings[1].scores[layer], rel=0.2)
    assert half.dtype == torch.bfloat16


def test_a_loss_that_is_no_number_stops_and_names_the_layer(batches, heldout, tmp_path):
    teacher, wild = build_teacher("llama"), rank_stage(sweep="plain", learning_rate=1e30)
    with pytest.raises(StoppedError, match=r"layer 0: the loss is \w+ (at step|on the held-out).*\(now 1e\+30\)"):
        rank_layers(teacher, teacher, batches, heldout, wild, state_dir=tmp_path)
    assert not list(tmp_path.iterdir())

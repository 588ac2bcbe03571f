"""Fitting mixers: what error is taken where, on whose hidden states, and that nothing else moves."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hybridize.models import attention_module
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.spec.stages import FitStage
from hybridize.training import fit, heldout_divergence, read_metrics
from hybridize.transfer import convert


def _relative_errors(student, teacher, rows, layers):
    """By hand: every document alone, through the teacher's layers as they are."""
    errors, squares = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for i in range(len(rows)):
        row = rows[i]
        starts = [*(row["position_ids"] == 0).nonzero()[0], len(row["input_ids"])]
        for begin, end in pairwise(starts):
            ids = torch.from_numpy(row["input_ids"][begin:end]).long().unsqueeze(0)
            with torch.no_grad():
                hidden = teacher(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
                positions = torch.arange(end - begin).unsqueeze(0)
                mask = torch.full((1, 1, end - begin, end - begin), -torch.inf, dtype=hidden[0].dtype).triu(1)
                for layer in layers:
                    block = teacher.model.layers[layer]
                    entering = block.input_layernorm(hidden[layer])
                    rotary = teacher.model.rotary_emb(entering, positions)
                    target = block.self_attn(entering, position_embeddings=rotary, attention_mask=mask)[0]
                    output = attention_module(student, layer)(entering)[0]
                    errors[layer] += (output - target).square().sum().item()
                    squares[layer] += target.square().sum().item()
    return {str(layer): errors[layer] / squares[layer] for layer in layers}


def _teacher(tools):
    teacher = tools.teacher().double()
    torch.nn.init.ones_(teacher.model.embed_tokens.weight[0])  # padding would not be silent if it counted
    return teacher


def _fit(tools, folder, student=None, num_rows=None, **changes):
    teacher = _teacher(tools)
    student = tools.student(teacher) if student is None else student
    stage = tools.stage(FitStage, **changes)
    rows = tools.rows(num_rows or 4 * stage.steps)
    result = fit(student, teacher, rows, stage, folder)
    return result, student, teacher, rows, read_metrics(folder / "metrics.jsonl")


def test_loss_is_the_relative_error_of_separate_documents(tools, tmp_path):
    fresh = tools.student(_teacher(tools))
    _, student, teacher, rows, records = _fit(tools, tmp_path, steps=1)
    expected = _relative_errors(fresh, teacher, rows, (0, 2))
    assert records[0]["loss_by_layer"] == pytest.approx(expected, rel=1e-6)
    assert records[0]["loss_relative"] == pytest.approx(sum(expected.values()) / 2, rel=1e-6)
    after = _relative_errors(student, teacher, rows, (0, 2))
    assert all(after[layer] < expected[layer] for layer in expected)


def test_silence_has_a_loss_of_one(tools, tmp_path):
    student = tools.student(_teacher(tools))
    for layer in (0, 2):
        torch.nn.init.zeros_(attention_module(student, layer).mixer.out_proj.weight)
    records = _fit(tools, tmp_path, student, steps=1)[-1]
    assert records[0]["loss_by_layer"] == pytest.approx({"0": 1, "2": 1}, rel=1e-6)


def test_fit_lowers_the_loss_of_every_layer(tools, tmp_path):
    changes = {"steps": 30, "learning_rate": 1e-2, "schedule": "constant"}
    result, *_, rows, records = _fit(tools, tmp_path, **changes)
    for layer in ("0", "2"):
        assert records[-1]["loss_by_layer"][layer] < 0.9 * records[0]["loss_by_layer"][layer]
    assert result.final_loss_nats is None
    losses = [record["loss_relative"] for record in records]
    assert result.final_loss_relative == pytest.approx(sum(losses[-3:]) / 3)
    assert result.tokens == result.loss_tokens == records[-1]["tokens"] == len(rows.input_ids)


def test_only_mixers_move(tools, tmp_path):
    fresh = tools.copy_of(tools.student(_teacher(tools)))
    original = tools.copy_of(_teacher(tools))
    result, student, teacher, *_ = _fit(tools, tmp_path, steps=2)
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert moved == {name for name in fresh if ".mixer." in name}
    assert result.num_trainable_parameters == sum(fresh[name].numel() for name in moved)
    tools.assert_same(teacher, original)
    assert not any(attention_module(teacher, layer)._forward_hooks for layer in range(3))
    saved = tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors"
    assert saved.stat().st_size < 1.2 * sum(fresh[name].nbytes for name in moved) + 4096, "checkpoints: mixers only"


def test_half_precision_stays_but_for_the_mixers(tools, tmp_path):
    teacher = tools.teacher().to(torch.bfloat16)
    student = tools.student(teacher)
    before = tools.copy_of(student)
    fit(student, teacher, tools.rows(4), tools.stage(FitStage, steps=1), tmp_path)
    for name, tensor in student.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".mixer." in name else torch.bfloat16)
        assert torch.equal(tensor, before[name]) == (".mixer." not in name)


def test_mixers_see_the_teachers_hidden_states(tools, tmp_path):
    """So what the student has become elsewhere does not matter, and none of its layers runs."""
    expected = _fit(tools, tmp_path / "one", steps=2)[1]
    student = tools.student(_teacher(tools))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".mixer." not in name:
                parameter.normal_()

    def forward(*args, **kwargs):
        raise AssertionError("the student runs")

    student.model.forward = forward
    other = _fit(tools, tmp_path / "other", student, steps=2)[1]
    for layer in (0, 2):
        tools.assert_same(attention_module(other, layer), tools.copy_of(attention_module(expected, layer)))


def test_layers_do_not_depend_on_one_another(tools, tmp_path):
    """But for the clipping of their common gradient, which is too high to clip here."""
    _, expected, *_, records = _fit(tools, tmp_path / "one", steps=3, max_grad_norm=1e9)
    student = tools.student(_teacher(tools))
    torch.nn.init.normal_(attention_module(student, 0).mixer.out_proj.weight)
    _, other, *_, others = _fit(tools, tmp_path / "other", student, steps=3, max_grad_norm=1e9)
    tools.assert_same(attention_module(other, 2), tools.copy_of(attention_module(expected, 2)))
    assert [r["loss_by_layer"]["2"] for r in records] == [r["loss_by_layer"]["2"] for r in others]
    assert records[0]["loss_by_layer"]["0"] != others[0]["loss_by_layer"]["0"]


def test_frozen_mixer_is_left_out(tools, tmp_path):
    fresh = tools.student(_teacher(tools))
    _, student, *_, records = _fit(tools, tmp_path, steps=2, freeze=("layers.0.",))
    tools.assert_same(attention_module(student, 0), tools.copy_of(attention_module(fresh, 0)))
    assert records[0]["loss_by_layer"].keys() == {"2"}
    assert records[0]["loss_relative"] == pytest.approx(records[0]["loss_by_layer"]["2"])


def test_gradient_checkpointing_changes_nothing(tools, tmp_path):
    one, other = (_fit(tools, tmp_path / str(c), steps=2, gradient_checkpointing=c)[1] for c in (False, True))
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_fit_refuses_a_model_without_mixers(tools, tmp_path):
    teacher = tools.teacher()
    with pytest.raises(ValueError, match="student: it has no mixer to fit; convert layers first"):
        fit(tools.teacher(), teacher, tools.rows(24), tools.stage(FitStage), tmp_path)


def test_fit_refuses_another_teacher(tools, tmp_path):
    student = tools.student(tools.teacher())
    with pytest.raises(ValueError, match="it is made of a llama, but the teacher is a mistral"):
        fit(student, tools.teacher("mistral"), tools.rows(24), tools.stage(FitStage), tmp_path)
    teacher = tools.teacher()
    teacher.config.hidden_size = 48
    with pytest.raises(ValueError, match="its hidden_size is 32, the teacher's 48"):
        fit(student, teacher, tools.rows(24), tools.stage(FitStage), tmp_path)


@pytest.mark.slow
def test_fit_brings_a_converted_trained_model_nearer_to_its_teacher(pocket, tmp_path):
    """Few steps at a high rate: what is matched layer by layer serves the whole."""
    teacher, _, rows = pocket
    hybrid, _ = convert(teacher, LayoutSpec.replace(16, (12, 13, 14, 15), Mamba1Spec()))
    heldout = rows.part(0, 2)
    before = heldout_divergence(hybrid, teacher, heldout)
    stage = FitStage(name="fit", model="hybrid", steps=16, tokens_per_step=256, sequence_length=256, learning_rate=1e-2)
    fit(hybrid, teacher, rows.part(2, 18), stage, tmp_path)
    first, *_, last = read_metrics(Path(tmp_path) / "metrics.jsonl")
    assert all(last["loss_by_layer"][layer] < 0.7 * loss for layer, loss in first["loss_by_layer"].items())
    assert heldout_divergence(hybrid, teacher, heldout) < 0.3 * before

"""Distillation: what is trained, by how much, and what is left alone."""

import json

import numpy as np
import pytest
import torch

from hybridize.data.packing import PackedRows
from hybridize.training import distill, read_metrics
from hybridize.training.parameters import decays


def test_distill_lowers_the_loss_and_records_every_step(teacher, tools, tmp_path):
    rows = repeated = tools.rows(4)
    stage = tools.stage(steps=12, schedule="constant", learning_rate=1e-2, save_every=50)
    for _ in range(11):
        repeated = _concatenate(repeated, rows)
    seen = []
    student = tools.student(teacher)
    result = distill(student, teacher, repeated, stage, tmp_path, on_log=lambda r, total: seen.append((r, total)))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record for record, _ in seen] == records
    assert {total for _, total in seen} == {12}
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["loss_nats"] < 0.6 * records[0]["loss_nats"]
    assert records[-1]["tokens"] == result.tokens == len(repeated.input_ids)
    assert records[-1]["loss_tokens"] == result.loss_tokens == repeated.stats["num_completion_tokens"]
    assert records[0]["loss_tokens"] == rows.stats["num_completion_tokens"]
    assert result.final_loss_nats == records[-1]["loss_nats"]
    assert (result.steps, result.stopped, result.final_loss_relative) == (12, "", None)
    assert result.seconds == pytest.approx(records[-1]["seconds"], abs=1e-3)
    assert result.num_trainable_parameters == sum(p.numel() for p in student.parameters())
    assert not student.training
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert student.config.use_cache


def test_distill_prints_nothing(llama, tools, tmp_path, capfd):
    distill(tools.student(llama), llama, tools.rows(4), tools.stage(steps=1), tmp_path)
    distill(tools.student(llama), llama, tools.rows(4), tools.stage(steps=1), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_step_is_the_same_however_it_is_cut_into_batches(teacher, tools, tmp_path):
    """Rows differ in their number of completion tokens, so a mean of means would show."""
    teacher.double()
    rows = tools.rows(16)
    students, losses = [], []
    for rows_per_batch in (8, 1):
        student = tools.student(teacher)
        stage = tools.stage(
            steps=2,
            tokens_per_step=8 * rows.sequence_length,
            rows_per_batch=rows_per_batch,
            max_grad_norm=0.1,
        )
        distill(student, teacher, rows, stage, tmp_path / str(rows_per_batch))
        students.append(tools.copy_of(student))
        losses.append([r["loss_nats"] for r in read_metrics(tmp_path / str(rows_per_batch) / "metrics.jsonl")])
    for name, tensor in students[0].items():
        torch.testing.assert_close(tensor, students[1][name], rtol=0, atol=1e-9)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_gradient_checkpointing_changes_nothing(teacher, tools, tmp_path):
    students = []
    for checkpointing in (False, True):
        student = tools.student(teacher)
        stage = tools.stage(steps=2, gradient_checkpointing=checkpointing)
        distill(student, teacher, tools.rows(8), stage, tmp_path / str(checkpointing))
        students.append(student)
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in students[1].modules())


def test_teacher_is_untouched_and_keeps_its_dtype(llama, tools, tmp_path):
    student = tools.student(llama)
    llama.to(torch.bfloat16)
    before = tools.copy_of(llama)
    distill(student, llama, tools.rows(4), tools.stage(steps=1), tmp_path)
    tools.assert_same(llama, before)
    assert not llama.training


def test_half_precision_student_is_trained_in_fp32(llama, tools, tmp_path):
    student = tools.student(llama.to(torch.bfloat16))
    before = student.lm_head.weight.clone()
    distill(student, llama, tools.rows(4), tools.stage(steps=1, learning_rate=1e-6), tmp_path)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    change = (student.lm_head.weight - before.float()).abs().max()
    assert 0 < change < 1e-5, "too small a change for bf16 to hold"


def test_train_mixers_leaves_the_rest_bit_for_bit(teacher, tools, tmp_path):
    student = tools.student(teacher)
    before = tools.copy_of(student)
    result = distill(student, teacher, tools.rows(8), tools.stage(steps=2, train="mixers"), tmp_path)
    moved = {name for name, t in student.state_dict().items() if not torch.equal(t, before[name])}
    mixers = {name for name, _ in student.named_parameters() if ".mixer." in name}
    assert moved == mixers
    assert result.num_trainable_parameters == sum(student.state_dict()[name].numel() for name in mixers)
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_freeze_keeps_named_tensors_bit_for_bit(family, tools, tmp_path):
    """In a Llama that ties them, freezing the head freezes the embeddings."""
    teacher = tools.teacher(family)
    student = tools.student(teacher)
    before = tools.copy_of(student)
    stage = tools.stage(steps=2, freeze=("lm_head", "mlp."), weight_decay=0.1)
    distill(student, teacher, tools.rows(8), stage, tmp_path)
    for name, tensor in student.state_dict().items():
        tied = family == "llama" and "embed_tokens" in name
        frozen = "lm_head" in name or "mlp." in name or tied
        assert torch.equal(tensor, before[name]) == frozen, name


def test_weight_decay_acts_on_weights_only(llama, tools, tmp_path):
    """With a gradient of zero (the student is the teacher), only decay moves a parameter."""
    student = tools.teacher("llama")
    before = tools.copy_of(student)
    stage = tools.stage(steps=1, weight_decay=0.1, schedule="constant", learning_rate=1e-3)
    distill(student, llama, tools.rows(4), stage, tmp_path)
    ratio = student.model.layers[0].mlp.up_proj.weight / before["model.layers.0.mlp.up_proj.weight"]
    assert ratio.median().item() == pytest.approx(1 - 1e-4, abs=3e-5)


def test_decay_goes_by_name_and_shape(llama, tools):
    names = {name: decays(name, parameter) for name, parameter in tools.student(llama).named_parameters()}
    spared = {name.removeprefix("model.layers.0.") for name, decayed in names.items() if not decayed}
    spared = {name for name in spared if not name.startswith("model.layers.")}
    mixer = {f"self_attn.mixer.{name}" for name in ("A_log", "D", "dt_proj.bias", "conv1d.bias")}
    assert spared == mixer | {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "model.norm.weight",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("mpl.",)}, r"freeze: 'mpl\.' is part of no parameter's name; names are .*mlp"),
        ({"freeze": ("weight", "A_log", "D", "bias")}, "leaves nothing to train"),
        ({"steps": 3}, r"rows: there are 8, but 3 steps of 96 tokens take 12; pack that many"),
        ({"sequence_length": 12}, r"rows: they are of 24 tokens, but the stage's sequence_length is 12"),
    ],
)
def test_distill_refuses(changes, message, llama, tools, tmp_path):
    student = tools.student(llama)
    with pytest.raises(ValueError, match=message):
        distill(student, llama, tools.rows(8), tools.stage(**{"steps": 2} | changes), tmp_path)
    assert all(p.requires_grad for p in student.parameters())


def test_distill_refuses_mixers_of_a_student_without(llama, tools, tmp_path):
    with pytest.raises(ValueError, match="train: 'mixers' is asked for, but the student has none"):
        distill(tools.teacher(), llama, tools.rows(24), tools.stage(train="mixers"), tmp_path)


def test_distill_refuses_a_student_in_the_teachers_memory(llama, tools, tmp_path):
    with pytest.raises(ValueError, match=r"shares its memory with the teacher's .*share=False"):
        distill(llama, llama, tools.rows(24), tools.stage(), tmp_path)


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_follows_the_schedule(schedule, warmup_steps, expected, llama, tools, tmp_path):
    stage = tools.stage(steps=4, schedule=schedule, warmup_steps=warmup_steps, learning_rate=1e-3)
    distill(tools.student(llama), llama, tools.rows(16), stage, tmp_path)
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3 * share for share in expected], rel=1e-4)


def _concatenate(one, other):
    return PackedRows(
        np.concatenate([one.input_ids, other.input_ids]),
        np.concatenate([one.position_ids, other.position_ids]),
        np.concatenate([one.completion, other.completion]),
        np.concatenate([one.offsets, other.offsets[1:] + one.offsets[-1]]),
        one.sequence_length,
    )


def test_metrics_file_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none.jsonl") == []

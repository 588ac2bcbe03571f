"""Fine-tuning: TRL's own loss on the same conversations, on completions only, for hybrids and plain models."""

import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoTokenizer

from hybridize.data.packing import pack_rows
from hybridize.data.sources import iter_conversations
from hybridize.models import load_teacher
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.spec.data import WorldDataSpec
from hybridize.spec.stages import SftStage
from hybridize.training import finetune, read_metrics
from hybridize.transfer import convert

LENGTH = 256


@pytest.fixture(scope="module")
def world(tiny_teacher):
    """A tokenizer, packed rows of the world, and the conversations that they hold."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    data = WorldDataSpec(levels=(1,))
    rows = pack_rows(data, tokenizer, LENGTH, 4, seed=0)
    documents = set()
    for i in range(len(rows)):
        row = rows[i]
        starts = [*(row["position_ids"] == 0).nonzero()[0], len(row["input_ids"])]
        documents |= {tuple(row["input_ids"][begin:end].tolist()) for begin, end in pairwise(starts)}
    chats = []
    for messages in iter_conversations(data, 0):
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        if tuple(ids) in documents:
            chats.append({"prompt": messages[:-1], "completion": messages[-1:]})
            documents.remove(tuple(ids))
        if not documents:
            return tokenizer, rows, chats


def _model(tiny_teacher, hybrid):
    teacher = load_teacher(tiny_teacher, dtype=torch.float32)
    if not hybrid:
        return teacher.requires_grad_(True)
    return convert(teacher, LayoutSpec.replace(4, (1, 3), Mamba1Spec()), "random")[0]


def _stage(**changes):
    settings = {
        "name": "sft",
        "model": "hybrid",
        "steps": 1,
        "tokens_per_step": 4 * LENGTH,
        "sequence_length": LENGTH,
        "rows_per_batch": 2,
        "learning_rate": 1e-3,
        "schedule": "constant",
    }
    return SftStage(**settings | changes)


@pytest.mark.parametrize("hybrid", [True, False])
def test_first_step_is_that_of_trl_on_the_same_conversations(hybrid, world, tiny_teacher, tmp_path, monkeypatch):
    """TRL from messages on: its rendering, its labels, its packing, its loss, its gradient."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    monkeypatch.setenv("CI", "1")  # it tells its makers of its use otherwise
    disable_progress_bars()
    tokenizer, rows, chats = world
    finetune(_model(tiny_teacher, hybrid), rows, _stage(), tmp_path / "ours")
    ours = read_metrics(tmp_path / "ours" / "metrics.jsonl")[0]
    config = SFTConfig(
        output_dir=str(tmp_path / "theirs"),
        packing=True,
        max_length=LENGTH,
        completion_only_loss=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    theirs = SFTTrainer(
        _model(tiny_teacher, hybrid), config, train_dataset=Dataset.from_list(chats), processing_class=tokenizer
    )
    assert len(theirs.train_dataset) == 4, "two batches of two rows make the step"
    theirs.train()
    log = theirs.state.log_history[0]
    # They run a batch's rows in one, we one beside the other.
    assert ours["loss_nats"] == pytest.approx(log["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(log["grad_norm"], rel=1e-4)
    assert ours["loss_tokens"] == rows.stats["num_completion_tokens"]


@pytest.mark.parametrize("hybrid", [True, False])
def test_loss_falls_on_traces_seen_again(hybrid, world, tiny_teacher, tmp_path):
    _, rows, _ = world
    model = _model(tiny_teacher, hybrid)
    stage = _stage(steps=4, tokens_per_step=LENGTH, rows_per_batch=1, train="all")
    first = finetune(model, rows, stage, tmp_path / "once")
    again = finetune(model, rows, stage, tmp_path / "again")
    assert again.final_loss_nats < first.final_loss_nats - 0.05
    assert first.num_trainable_parameters == sum(p.numel() for p in model.parameters())


def test_prompts_and_padding_are_not_learnt(tools, tmp_path):
    """With a completion of one token, the head's gradient comes from one position; so the loss is that token's."""
    rows = tools.rows(4)
    rows.completion[:] = False
    rows.completion[1] = True
    teacher = tools.teacher()
    student = tools.student(teacher)
    ids = torch.from_numpy(rows.input_ids[:2]).long().unsqueeze(0)
    with torch.no_grad():
        expected = -student(input_ids=ids).logits[0, 0].log_softmax(-1)[ids[0, 1]].item()
    finetune(student, rows, tools.stage(SftStage, steps=1), tmp_path)
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert record["loss_nats"] == pytest.approx(expected, rel=1e-5)
    assert record["loss_tokens"] == 1


def test_flattened_for_flash_attention_it_is_the_same(tools, monkeypatch):
    from hybridize.training import sft

    student, rows = tools.student(tools.teacher()), tools.rows(3)
    batch = [rows[i] for i in range(3)]
    expected = sft.collate(student, rows, batch)
    monkeypatch.setattr(student.config, "_attn_implementation_internal", "flash_attention_2")
    flat = sft.collate(student, rows, batch)
    for name, tensor in expected.items():
        assert flat[name].shape == (1, 3 * rows.sequence_length)
        assert torch.equal(flat[name].flatten(), tensor.flatten())


def test_logits_of_a_whole_batch_never_exist(tools, tmp_path):
    student = tools.student(tools.teacher())
    student.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran over all positions"))
    finetune(student, tools.rows(4), tools.stage(SftStage, steps=1), tmp_path)


def test_nobody_is_told_and_no_card_is_written(tools, tmp_path, monkeypatch):
    from trl.trainer import base_trainer

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **_: pytest.fail("telemetry"))
    finetune(tools.student(tools.teacher()), tools.rows(4), tools.stage(SftStage, steps=1), tmp_path)
    assert not list(tmp_path.rglob("README.md"))
    names = {file.name for file in (tmp_path / "checkpoints" / "checkpoint-1").iterdir()}
    assert not {name for name in names if "token" in name}


def test_finetune_of_mixers_leaves_the_rest_bit_for_bit(tools, tmp_path):
    student = tools.student(tools.teacher())
    before = tools.copy_of(student)
    finetune(student, tools.rows(8), tools.stage(SftStage, steps=2, train="mixers"), tmp_path)
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".mixer." in name}


def test_finetune_refuses_rows_of_another_length(tools, tmp_path):
    stage = tools.stage(SftStage, sequence_length=12)
    with pytest.raises(ValueError, match="they are of 24 tokens, but the stage's sequence_length is 12"):
        finetune(tools.student(tools.teacher()), tools.rows(24), stage, tmp_path)


def test_records_are_plain_json(tools, tmp_path):
    finetune(tools.student(tools.teacher()), tools.rows(4), tools.stage(SftStage, steps=1), tmp_path)
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    keys = ["step", "loss_nats", "learning_rate", "grad_norm", "tokens", "loss_tokens", "seconds"]
    assert list(json.loads(line)) == keys

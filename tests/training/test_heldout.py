"""The divergence of a batch: no leak between documents, no weight on padding, the dense formula's value."""

from itertools import pairwise

import pytest
import torch

from hybridize.losses import dense_divergence
from hybridize.training import heldout_divergence
from hybridize.training.divergence import batch_divergence


@pytest.fixture
def pair(teacher, tools):
    teacher.double()
    return tools.student(teacher).eval(), teacher


def _documents(row):
    starts = [*(row["position_ids"] == 0).nonzero()[0], len(row["input_ids"])]
    for begin, end in pairwise(starts):
        yield {name: torch.from_numpy(column[begin:end]) for name, column in row.items()}


def _dense(student, teacher, document, kind="reverse_kl"):
    ids = document["input_ids"].long().unsqueeze(0)
    with torch.no_grad():
        q, p = student(input_ids=ids).logits[0, :-1], teacher(input_ids=ids).logits[0, :-1]
    return dense_divergence(q, p, kind=kind, valid_T=document["completion"][1:], reduction="sum")


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_packed_rows_have_the_loss_of_separate_documents(kind, pair, tools):
    rows = tools.rows(3)
    packed = batch_divergence(*pair, rows.collate([rows[i] for i in range(3)]), kind)
    separate = sum(_dense(*pair, d, kind) for i in range(3) for d in _documents(rows[i]))
    torch.testing.assert_close(packed.detach(), separate, rtol=1e-9, atol=1e-9)


def test_flattened_for_flash_attention_it_is_the_same(pair, tools, monkeypatch):
    rows = tools.rows(3)
    batch = rows.collate([rows[i] for i in range(3)])
    expected = batch_divergence(*pair, batch, "reverse_kl")
    for model in pair:
        base, config = model.base_model, model.config
        shapes = []

        def forward(*args, run=base.forward, shapes=shapes, config=config, **kwargs):
            shapes.append(kwargs["input_ids"].shape)
            config._attn_implementation = "eager"
            return run(*args, **kwargs)

        monkeypatch.setattr(base, "forward", forward)
        monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
        value = batch_divergence(*pair, batch, "reverse_kl")
        assert shapes == [(1, 3 * rows.sequence_length)]
        # Eager attention takes its softmax in fp32.
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_padding_neither_counts_nor_leaks(pair, tools):
    rows = tools.rows(4)
    batch = rows.collate([rows[i] for i in range(4)])
    expected = batch_divergence(*pair, batch, "reverse_kl")
    padding = torch.ones_like(batch["valid"])
    for i in range(4):
        padding[i, : len(rows[i]["input_ids"])] = False
    assert padding.any()
    assert not (padding & batch["valid"]).any()
    batch["input_ids"] = torch.where(padding, 7, batch["input_ids"])
    torch.testing.assert_close(batch_divergence(*pair, batch, "reverse_kl"), expected, rtol=0, atol=0)


def test_heldout_divergence_is_the_mean_over_completion_tokens(pair, tools):
    student, teacher = pair
    student.train()
    rows = tools.rows(5)
    values = [heldout_divergence(student, teacher, rows, rows_per_batch=n) for n in (1, 2, 5)]
    separate = [_dense(student, teacher, d).item() for i in range(5) for d in _documents(rows[i])]
    expected = sum(separate) / rows.stats["num_completion_tokens"]
    assert values == pytest.approx([expected] * 3, rel=1e-9)
    assert student.training
    assert heldout_divergence(teacher, teacher, rows) == pytest.approx(0, abs=1e-12)
    student.eval()


def test_heldout_divergence_refuses_rows_without_completions(pair, tools):
    rows = tools.rows(1)
    rows.completion[:] = False
    with pytest.raises(ValueError, match="no completion token"):
        heldout_divergence(*pair, rows)

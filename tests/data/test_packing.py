"""Packed rows: whole documents only, every one accounted for, the loss where the assistant wrote."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from hybridize.data.chat import render
from hybridize.data.packing import pack_rows
from hybridize.data.sources import iter_conversations
from hybridize.models.hybrid import document_starts
from hybridize.spec.data import FileDataSpec, WorldDataSpec

WORLD = WorldDataSpec(levels=(1, 2))
LENGTH = 256


@pytest.fixture(scope="module")
def rows(tokenizer):
    return pack_rows(WORLD, tokenizer, LENGTH, 12, seed=3)


def documents(rows):
    """Tokens and completion mask of each document, in order."""
    starts = [*np.flatnonzero(rows.position_ids == 0), len(rows.input_ids)]
    for begin, end in pairwise(starts):
        assert (rows.position_ids[begin:end] == np.arange(end - begin)).all()
        yield tuple(rows.input_ids[begin:end].tolist()), rows.completion[begin:end]


def test_rows_hold_whole_different_documents(rows, tokenizer):
    expected = {}
    for messages in _first(iter_conversations(WORLD, 3), 60):
        rendered = render(tokenizer, messages)
        expected[tuple(rendered.input_ids)] = rendered.num_prompt_tokens
    found = list(documents(rows))
    assert len(rows) == 12
    assert len({ids for ids, _ in found}) == len(found) == rows.stats["num_documents"]
    for ids, completion in found:
        assert (completion == (np.arange(len(ids)) >= expected[ids])).all()
    sizes = np.diff(rows.offsets)
    assert sizes.max() <= LENGTH
    assert sizes.mean() > 0.85 * LENGTH
    assert not np.array_equal(sizes, np.sort(sizes)[::-1]), "not in the order of packing"


def test_stats_count_what_is_there(rows):
    assert rows.stats == {
        "num_documents": sum(1 for _ in documents(rows)),
        "num_dropped": 0,
        "num_tokens": sum(len(ids) for ids, _ in documents(rows)),
        "num_completion_tokens": sum(int(completion.sum()) for _, completion in documents(rows)),
        "epochs": 1,
    }


def test_packing_is_deterministic(rows, tokenizer):
    assert pack_rows(WORLD, tokenizer, LENGTH, 12, seed=3).digest() == rows.digest()
    assert pack_rows(WORLD, tokenizer, LENGTH, 12, seed=4).digest() != rows.digest()


def test_collate_pads_with_a_document_of_its_own(rows):
    batch = rows.collate([rows[i] for i in range(len(rows))])
    starts = document_starts(batch["position_ids"], len(rows))
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["valid"].shape == (12, LENGTH)
    padded = 0
    for i in range(len(rows)):
        row, size = rows[i], len(rows[i]["input_ids"])
        assert batch["input_ids"][i, :size].tolist() == row["input_ids"].tolist()
        assert starts[i].nonzero()[:, 0].tolist() == [
            *np.flatnonzero(row["position_ids"] == 0),
            *([size] if size < LENGTH else []),
        ]
        padded += size < LENGTH
        predicted = batch["valid"][i].nonzero()[:, 0] + 1
        assert predicted.tolist() == np.flatnonzero(row["completion"]).tolist()
    assert padded
    assert batch["valid"].sum() == rows.stats["num_completion_tokens"]
    assert batch["valid"].dtype == torch.bool


def test_part_is_some_of_the_rows(rows):
    part = rows.part(4, 9)
    assert len(part) == 5
    assert all((part[i]["input_ids"] == rows[4 + i]["input_ids"]).all() for i in range(5))
    total = [rows.part(0, 4).stats, part.stats, rows.part(9, 12).stats]
    assert sum(stats["num_tokens"] for stats in total) == rows.stats["num_tokens"]
    with pytest.raises(ValueError, match="there are 12"):
        rows.part(4, 13)
    with pytest.raises(IndexError):
        rows[12]


def test_short_file_is_gone_through_again(write_lines, tokenizer):
    path = write_lines(*({"prompt": f"add {i} and {i}", "completion": f"{2 * i}"} for i in range(5)))
    rows = pack_rows(FileDataSpec(path=str(path)), tokenizer, 64, 6, seed=0)
    counts = {}
    for ids, _ in documents(rows):
        counts[ids] = counts.get(ids, 0) + 1
    assert len(rows) == 6
    assert len(counts) == 5
    assert rows.stats["epochs"] > 1
    assert max(counts.values()) <= rows.stats["epochs"]


def test_long_documents_are_dropped_and_counted_never_cut(write_lines, tokenizer):
    short = [{"prompt": f"add {i} and 1", "completion": f"{i + 1}"} for i in range(30)]
    long = [{"prompt": "count", "completion": "1 2 3 4 5 " * 20}] * 3
    path = write_lines(*short, *long)
    rows = pack_rows(FileDataSpec(path=str(path)), tokenizer, 48, 7, seed=0)
    assert rows.stats["epochs"] >= 1
    assert 1 <= rows.stats["num_dropped"] <= 3 * rows.stats["epochs"]
    end = tokenizer.eos_token_id
    assert all(ids[-1] == end for ids, _ in documents(rows))


def test_only_long_documents_are_an_error(write_lines, tokenizer):
    path = write_lines({"prompt": "count", "completion": "1 2 3 4 5 " * 20}, {"prompt": "x", "completion": "y " * 40})
    size = min(
        len(render(tokenizer, messages).input_ids)
        for messages in _first(iter_conversations(FileDataSpec(path=str(path)), 0), 2)
    )
    with pytest.raises(ValueError, match=f"all 2 conversations .* shortest has {size} tokens; use at least {size}"):
        pack_rows(FileDataSpec(path=str(path)), tokenizer, 16, 1, seed=0)
    with pytest.raises(ValueError, match="all 1000 conversations seen are longer"):
        pack_rows(WORLD, tokenizer, 16, 1, seed=0)


def test_line_that_the_template_refuses_is_named(write_lines, tokenizer):
    tool = {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}
    path = write_lines({"prompt": "x", "completion": "y"}, tool)
    with pytest.raises(ValueError, match=r"traces.jsonl:2: the tokenizer's chat template .*role tool is unknown"):
        pack_rows(FileDataSpec(path=str(path)), tokenizer, 64, 4, seed=0)


def test_packing_refuses_impossible_sizes(tokenizer):
    with pytest.raises(ValueError, match="sequence_length 1, num_rows 4: use at least 2 and 1"):
        pack_rows(WORLD, tokenizer, 1, 4, seed=0)


def test_packing_prints_nothing(tokenizer, capfd):
    pack_rows(WORLD, tokenizer, LENGTH, 2, seed=0)
    assert capfd.readouterr() == ("", "")


def _first(iterator, n):
    return [next(iterator) for _ in range(n)]

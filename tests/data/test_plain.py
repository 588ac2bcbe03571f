"""Plain text becomes whole paragraphs, every token of which but the first is predicted."""

import itertools

import numpy as np
import pytest

from hybridize.data.packing import pack_rows
from hybridize.data.plain import PIECE_CHARACTERS, is_plain, read_pieces
from hybridize.data.sources import read_prompts
from hybridize.spec.data import FileDataSpec

PARAGRAPHS = [f"paragraph {i} " + "word " * (20 + 13 * i % 60) for i in range(40)]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(PARAGRAPHS) + "\n\n\n\n" + "x" * 2000 + "\n")
    return FileDataSpec(path=str(file))


def test_pieces_hold_whole_paragraphs_in_order(text):
    pieces = read_pieces(text.path)
    assert [part for piece in pieces[:-1] for part in piece.split("\n\n")] == [p.strip() for p in PARAGRAPHS]
    assert pieces[-1] == "x" * 2000
    assert all(len(piece) <= PIECE_CHARACTERS for piece in pieces[:-1])
    joined = [len(a) + len(b.split("\n\n")[0]) + 2 for a, b in itertools.pairwise(pieces)]
    assert min(joined) > PIECE_CHARACTERS


def test_every_token_but_a_documents_first_is_predicted_and_none_is_lost(text, tiny_teacher):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    rows = pack_rows(text, tokenizer, 2048, 3, seed=0)
    assert rows.num_dropped == 0
    assert (rows.completion == (rows.position_ids != 0)).all()
    starts = np.flatnonzero(rows.position_ids == 0)
    documents = [tokenizer.decode(part[1:-1]) for part in np.split(rows.input_ids, starts[1:])]
    assert set(documents) <= {
        tokenizer.decode(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in read_pieces(text.path)
    }
    assert set(rows.input_ids[starts]) == {tokenizer.bos_token_id}
    assert (
        rows.digest()
        == pack_rows(text, tokenizer, 2048, 3, seed=0).digest()
        != pack_rows(text, tokenizer, 2048, 3, 1).digest()
    )


def test_pieces_longer_than_a_row_are_cut_and_none_of_their_tokens_is_lost(text, tiny_teacher):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    rows = pack_rows(text, tokenizer, 64, 400, seed=0)
    assert rows.epochs > 2
    assert rows.num_dropped == 0
    documents = np.split(rows.input_ids, np.flatnonzero(rows.position_ids == 0)[1:])
    pieces = [
        [tokenizer.bos_token_id, *tokenizer(piece, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for piece in read_pieces(text.path)
    ]
    parts = {tuple(piece[i : i + 64]) for piece in pieces for i in range(0, len(piece), 64)}
    assert {tuple(document.tolist()) for document in documents} == parts


def test_plain_text_holds_no_prompts(text):
    with pytest.raises(ValueError, match=r"text\.txt: plain text holds no prompts"):
        read_prompts(text, 1, 0)


@pytest.mark.parametrize(
    ("name", "plain"), [("a.txt", True), ("notes.md", True), ("a.jsonl", False), ("LICENSE", False)]
)
def test_a_name_tells_plain_text(name, plain):
    assert is_plain(name) is plain


def test_a_file_without_text_is_refused(tmp_path):
    (tmp_path / "empty.md").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.md: it holds no text"):
        read_pieces(str(tmp_path / "empty.md"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.txt: is not UTF-8"):
        read_pieces(str(tmp_path / "bytes.txt"))

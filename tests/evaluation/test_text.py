"""Perplexity on text: the plain formula over whole logits, what is counted, and files that are read or refused."""

import gzip
import itertools
import json
import lzma
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

from hybridize.evaluation import text as text_module
from hybridize.evaluation.text import evaluate_text, read_texts
from hybridize.losses import dense_divergence
from hybridize.models import find_family, load_teacher
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.spec.base import StoppedError
from hybridize.transfer import convert

DATA = Path(os.environ.get("HYBRIDIZE_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEXTS = [
    "Lena has 3 red marbles — Zürich, 日本.\n\nOmar has 4. How many are there?",
    "x",
    "The key is in the box.",
    "日",
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_teacher(tiny_teacher)


@pytest.fixture(scope="module")
def hybrid(teacher):
    return convert(teacher, LayoutSpec.replace(4, (0, 2), Mamba1Spec(state_size=8)))[0]


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher):
    return AutoTokenizer.from_pretrained(tiny_teacher)


@pytest.fixture(scope="module")
def stories():
    folder = DATA / "models" / "stories260K_hf"
    if not folder.is_dir():
        pytest.skip(f"no trained model at {folder}; set HYBRIDIZE_DATA")
    return load_teacher(folder), AutoTokenizer.from_pretrained(folder)


def windows_of(tokenizer, texts, length, front=()):
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        step = length - len(front)
        for start in range(0, len(ids), step):
            yield [*front, *ids[start : start + step]]


@torch.no_grad()
def naive(model, teacher, windows):
    """Each window alone, whole logits: sums of nat, of both divergences, and the number of tokens."""
    nats = reverse = forward = 0.0
    count = 0
    for window in windows:
        if len(window) < 2:
            continue
        ids = torch.tensor([window])
        logits = model(ids, use_cache=False).logits[0, :-1]
        other = teacher(ids, use_cache=False).logits[0, :-1]
        nats -= logits.double().log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
        reverse += dense_divergence(logits, other, "reverse_kl", reduction="sum").item()
        forward += dense_divergence(logits, other, "forward_kl", reduction="sum").item()
        count += len(window) - 1
    return nats / count, reverse / count, forward / count, count


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_losses_equal_the_naive_ones_whatever_the_batch(hybrid, teacher, tokenizer, monkeypatch, batch_size, chunk):
    monkeypatch.setattr(text_module, "_CHUNK_TOKENS", chunk)
    options = {"sequence_length": 16, "batch_size": batch_size, "teacher": teacher}
    result = evaluate_text(hybrid, tokenizer, TEXTS, **options)
    nats, reverse, forward, count = naive(hybrid, teacher, windows_of(tokenizer, TEXTS, 16))
    assert result["tokens"] == count
    assert result["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert result["kl_nats"] == pytest.approx(reverse, rel=1e-4)
    assert result["forward_kl_nats"] == pytest.approx(forward, rel=1e-4)
    assert result["kl_nats"] != pytest.approx(result["forward_kl_nats"], rel=1e-2)
    alone = evaluate_text(teacher, tokenizer, TEXTS, sequence_length=16, batch_size=batch_size)
    assert result["teacher_nats_per_token"] == pytest.approx(alone["nats_per_token"], rel=1e-6)
    assert "kl_nats" not in alone


def test_logits_of_more_than_a_chunk_never_exist(hybrid, teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(text_module, "_CHUNK_TOKENS", 5)
    sizes = []
    logits = text_module._Head.logits

    def watched(head, hidden):
        sizes.append(len(hidden))
        return logits(head, hidden)

    def fail(*args):
        raise AssertionError("the head was applied to a whole batch")

    monkeypatch.setattr(text_module._Head, "logits", watched)
    hooks = [model.lm_head.register_forward_hook(fail) for model in (hybrid, teacher)]
    result = evaluate_text(hybrid, tokenizer, TEXTS, teacher=teacher, sequence_length=16, batch_size=100)
    for hook in hooks:
        hook.remove()
    assert max(sizes) == 5
    assert sum(sizes) == 2 * result["tokens"]  # once for each model


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere2", "gpt_neox"])
def test_what_a_family_does_to_its_logits_counts(tokenizer, family):
    torch.manual_seed(0)
    row = find_family(family)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    special = {
        "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 2.0},
        "granite": {"num_key_value_heads": 1, "logits_scaling": 0.25},
        "cohere2": {"num_key_value_heads": 1, "logit_scale": 0.3},
        "gpt_neox": {},
    }[family]
    config = row.teacher_config()(vocab_size=576, initializer_range=0.3, pad_token_id=0, **sizes, **special)
    model = row.teacher_model()(config).eval()
    result = evaluate_text(model, tokenizer, TEXTS, teacher=model, sequence_length=16)
    nats, *_ = naive(model, model, windows_of(tokenizer, TEXTS, 16))
    assert result["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert result["kl_nats"] == pytest.approx(0, abs=1e-6)


def test_a_model_is_at_no_distance_from_itself(teacher, tokenizer):
    result = evaluate_text(teacher, tokenizer, TEXTS, teacher=teacher, sequence_length=32)
    assert result["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert result["forward_kl_nats"] == pytest.approx(0, abs=1e-6)


def test_bits_per_byte_counts_the_bytes_of_what_is_predicted(teacher, tokenizer):
    text = "Omar has 4 — Zürich 日本."
    ids = tokenizer(text).input_ids
    result = evaluate_text(teacher, tokenizer, [text], sequence_length=1024)
    assert result["tokens"] == len(ids) - 1
    assert result["bytes"] == len(text.encode()) - len("O")  # the first token is not predicted
    bits = result["nats_per_token"] * result["tokens"] / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / result["bytes"])
    plain = "Lena has 3 red marbles."
    result = evaluate_text(teacher, tokenizer, [plain], sequence_length=4)
    skipped = [tokenizer.decode(window[:1]) for window in windows_of(tokenizer, [plain], 4)]
    assert result["bytes"] == len(plain) - sum(map(len, skipped))
    # A character of three tokens, of which the first is not predicted: it counts whole.
    assert evaluate_text(teacher, tokenizer, ["日"], sequence_length=8)["bytes"] == 3


def test_reading_ends_at_the_limit_of_tokens(teacher, tokenizer):
    drawn = []

    def endless():
        for number in itertools.count():
            drawn.append(number)
            yield TEXTS[0]

    progress = []
    result = evaluate_text(
        teacher,
        tokenizer,
        endless(),
        max_tokens=130,
        sequence_length=10,
        batch_size=2,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    length = len(tokenizer(TEXTS[0]).input_ids)
    assert len(drawn) == -(-130 // length)
    assert progress[-1] == (130, 130)
    assert result["tokens"] == 130 - result["windows"]
    assert len(progress) == -(-result["windows"] // 2)


def test_modes_are_left_as_they_were(hybrid, teacher, tokenizer):
    hybrid.train()
    evaluate_text(hybrid, tokenizer, TEXTS, teacher=teacher, sequence_length=16)
    assert hybrid.training
    assert not teacher.training
    hybrid.eval()


def test_a_trained_model_predicts_stories_and_each_window_begins_as_its_tokenizer_begins(stories):
    model, tokenizer = stories
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    result = evaluate_text(model, tokenizer, [story], sequence_length=16)
    ids = tokenizer(story, add_special_tokens=False).input_ids
    assert result["tokens"] == len(ids)  # <s> is the token that is not predicted
    assert result["bytes"] == len(story)
    nats, *_, count = naive(model, model, windows_of(tokenizer, [story], 16, front=[tokenizer.bos_token_id]))
    assert count == len(ids)
    assert result["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    whole = evaluate_text(model, tokenizer, [story], sequence_length=512)
    assert whole["perplexity"] < 5
    assert whole["perplexity"] < result["perplexity"]  # more context
    scrambled = " ".join(sorted(story.split()))
    assert evaluate_text(model, tokenizer, [scrambled], sequence_length=512)["perplexity"] > 4 * whole["perplexity"]


def test_books_are_read_and_a_conversion_is_farther_from_the_teacher_than_a_smaller_one(stories):
    books = DATA / "books.jsonl.xz"
    if not books.is_file():
        pytest.skip(f"no books at {books}; set HYBRIDIZE_DATA")
    model, tokenizer = stories
    options = {"teacher": model, "max_tokens": 3000, "sequence_length": 256, "batch_size": 4}
    divergences = []
    for layers in ((), (3,), (1, 2, 3)):
        hybrid, _ = convert(model, LayoutSpec.replace(5, layers, Mamba1Spec(state_size=8)))
        result = evaluate_text(hybrid, tokenizer, read_texts(books), **options)
        assert result["tokens"] == 3000
        divergences.append(result["kl_nats"])
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert 0.01 < divergences[1] < divergences[2]


@pytest.mark.parametrize("ending", ["", ".xz", ".gz"])
def test_files_of_both_kinds_are_read_compressed_or_not(tmp_path, ending):
    write = {"": open, ".xz": lzma.open, ".gz": gzip.open}[ending]
    rows = ["first\nline", "  ", "zweiter — Ü"]
    with write(tmp_path / f"a.b.jsonl{ending}", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": row, "title": 3}) for row in rows) + "\n\n")
    with write(tmp_path / f"b.txt{ending}", "wt", encoding="utf-8") as file:
        file.write("one\ntwo — Ü\n")
    assert list(read_texts(tmp_path / f"a.b.jsonl{ending}")) == [rows[0], rows[2]]
    assert list(read_texts(tmp_path / f"b.txt{ending}")) == ["one\ntwo — Ü\n"]


def test_a_long_plain_text_comes_in_pieces_of_whole_lines(tmp_path):
    file = tmp_path / "long.txt"
    line = "a line of some length " * 10 + "\n"
    file.write_text(line * 12_000)
    pieces = list(read_texts(file))
    assert len(pieces) > 1
    assert "".join(pieces) == line * 12_000
    assert all(piece.endswith("\n") and len(piece) < 1_100_000 for piece in pieces)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": "go', r"a\.jsonl line 2: .* is not JSON \(.*; write an object a line"),
        ("a.jsonl", b'\n{"txt": "x"}', r"a\.jsonl line 2: .*txt.* has no text; write an object with a string 'text'"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl line 1: .* has no text"),
        ("a.jsonl", b'["text"]', r"a\.jsonl line 1: .* has no text"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl line 1: its text holds half a character; write valid"),
        ("a.txt", b"\xff\xfe", r"a\.txt: it is not UTF-8 \(.*\); save it as UTF-8"),
        ("a.txt", b" \n", r"a\.txt: it holds no text; give a file that does"),
        ("a.jsonl", b'{"text": ""}', r"a\.jsonl: it holds no text"),
        (
            "a.txt.xz",
            lzma.compress(b"text " * 1000)[:-20],
            r"a\.txt\.xz: it cannot be read to its end .*fetch it again",
        ),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20], r"a\.txt\.gz: it cannot be read to its end"),
        ("a.txt.xz", b"text", r"a\.txt\.xz: it cannot be read to its end"),
        ("a.txt.gz", b"text", r"a\.txt\.gz: it cannot be read to its end"),
    ],
)
def test_faulty_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / name))


def test_files_that_cannot_be_read_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: it cannot be read \(No such file or directory\); check the path"):
        read_texts(tmp_path / "a.txt")
    for name in ("a.csv", "a.xz", "txt", "a.csv.gz"):
        with pytest.raises(ValueError, match=r"says nothing known; use \.txt or \.jsonl, perhaps \.xz or \.gz"):
            read_texts(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 1}, "max_tokens: 1 is out of range; use at least 2"),
        ({"sequence_length": 1}, "sequence_length: 1 is out of range"),
        ({"batch_size": 0}, "batch_size: 0 is out of range"),
        (
            {"sequence_length": 1_000_000},
            r"sequence_length: 1000000 is more than the model's \d+ positions.*use at most",
        ),
    ],
)
def test_options_out_of_range_are_named(teacher, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_text(teacher, tokenizer, TEXTS, **options)


def test_models_and_texts_that_do_not_fit_are_named(teacher, tokenizer, stories):
    with pytest.raises(ValueError, match="texts: they hold no token to predict; give longer ones"):
        evaluate_text(teacher, tokenizer, ["x", ""], sequence_length=16)
    with pytest.raises(ValueError, match=r"teacher: its vocabulary has 512 entries, the model's 576"):
        evaluate_text(teacher, tokenizer, TEXTS, teacher=stories[0], sequence_length=16)
    with pytest.raises(ValueError, match=r"tokenizer: .* does not say where in a text its tokens are"):
        evaluate_text(teacher, ByT5Tokenizer(), TEXTS, sequence_length=16)


def test_a_broken_model_is_no_result(tiny_teacher, tokenizer):
    broken = load_teacher(tiny_teacher)
    broken.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(StoppedError, match="the loss on the text is nan nat/token; the model is broken"):
        evaluate_text(broken, tokenizer, TEXTS, sequence_length=16)
    assert not broken.training

"""How well a model predicts plain text, and how far it is from its teacher there.

Perplexity is no measure of reasoning (a student can be within a hair of its teacher here and far behind when it
generates), but it shows at once whether a model is broken, and what a merge or a precision costs.

Shapes: R windows of a batch, L tokens of a window, N predicted tokens, C of a chunk, E width, V vocabulary.
"""

import gzip
import json
import lzma
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridize.losses import Kind, dense_divergence
from hybridize.models import logit_rule_of
from hybridize.spec.base import StoppedError

_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
_PIECE = 1 << 20
_CHUNK_TOKENS = 1024
_DIVERGENCES: dict[str, Kind] = {"kl_nats": "reverse_kl", "forward_kl_nats": "forward_kl"}
_LARGEST_NATS = 700.0  # e to this is still a number


def read_texts(path: str | Path) -> Iterator[str]:
    """Texts of a file, one after another, never holding all of it.

    Args:
        path: `.txt`, UTF-8, which is given in pieces of whole lines, of some 1,000,000 characters each; or `.jsonl`,
            an object with a string `text` a line, of which other keys are ignored. Either may end in `.xz` or `.gz`.

    Returns:
        The texts that are not blank; at least one.

    Raises:
        ValueError: at once: the file has another ending, or cannot be opened. While reading: it is cut short, is not
            UTF-8, or a line is not such an object; or there was no text. Names the place, the value and the remedy.
    """
    path = Path(path)
    kind = Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: the ending of its name says nothing known; use .txt or .jsonl, perhaps .xz or .gz")
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read ({error.strerror}); check the path") from None
    return _read(path, is_plain=kind == ".txt")


def evaluate_text(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    teacher: Any = None,
    max_tokens: int = 100_000,
    sequence_length: int = 2048,
    batch_size: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity of a model on texts, and with a teacher its divergence from it at the same tokens.

    Each text is cut into windows that do not overlap; the last one may be shorter. A window is a context of its own:
    it begins with what the tokenizer puts in front of a text (such as `<s>`), if anything. The first token of a
    window is never predicted. Where the tokenizer puts something in front, that is this token, and all of the text is
    predicted; where it does not, the first token of the text in each window is not, and counts nowhere.

    Never holds logits of more than a chunk of 1024 tokens.

    Args:
        model: a causal language model; left in the mode it is in, but run in evaluation mode.
        tokenizer: its tokenizer, a fast one.
        texts: what to predict.
        teacher: a model of the same vocabulary to compare with; on any device.
        max_tokens: of the texts, where reading ends.
        sequence_length: L, tokens of a window.
        batch_size: windows at a time.
        on_progress: called with (tokens read, `max_tokens`) after each batch.

    Returns:
        - `nats_per_token`: mean of -log q(token), and `perplexity`, e to it.
        - `bits_per_byte`: the same information per byte (UTF-8) of the text predicted, which can be compared
          between tokenizers.
        - `tokens` and `bytes` predicted; `windows`.
        - with a teacher, means over the same tokens: `kl_nats`, KL(model ‖ teacher), the divergence that distillation
          trains by default; `forward_kl_nats`, KL(teacher ‖ model); `teacher_nats_per_token`, the teacher's own loss.

    Raises:
        ValueError: an option is out of range, the windows are longer than the model's positions, the vocabularies
            differ, the tokenizer is not a fast one, or there is no token to predict.
        StoppedError: the loss is not a number, or too large for a perplexity.
    """
    _check(model, tokenizer, teacher, max_tokens, sequence_length, batch_size)
    if teacher is not None:
        teacher.to(model.device)
    models = [model] if teacher is None else [model, teacher]
    modes = [each.training for each in models]
    totals = dict.fromkeys(("nats", *(("teacher_nats", *_DIVERGENCES) if teacher is not None else ())), 0.0)
    tokens = num_bytes = num_windows = num_read = 0
    try:
        for each in models:
            each.eval()
        for batch in _batches(_windows(tokenizer, texts, max_tokens, sequence_length), batch_size):
            for name, nats in _batch_sums(model, teacher, batch).items():
                totals[name] += nats
            tokens += sum(window.num_predicted for window in batch)
            num_bytes += sum(window.num_bytes for window in batch)
            num_read += sum(window.num_read for window in batch)
            num_windows += len(batch)
            if on_progress:
                on_progress(num_read, max_tokens)
    finally:
        for each, mode in zip(models, modes, strict=True):
            each.train(mode)
    if not tokens:
        raise ValueError("texts: they hold no token to predict; give longer ones")
    means = {name: total / tokens for name, total in totals.items()}
    nats = means.pop("nats")
    if not nats < _LARGEST_NATS:
        raise StoppedError(f"the loss on the text is {nats} nat/token; the model is broken, train or convert it again")
    result = {
        "nats_per_token": nats,
        "perplexity": math.exp(nats),
        "bits_per_byte": nats * tokens / num_bytes / math.log(2),
        "tokens": tokens,
        "bytes": num_bytes,
        "windows": num_windows,
    }
    if teacher is not None:
        result["teacher_nats_per_token"] = means.pop("teacher_nats")
    return result | means


@dataclass(frozen=True)
class _Window:
    """Tokens of a window, and how many of its last ones are predicted, of so many bytes and read tokens."""

    ids: list[int]
    num_predicted: int
    num_bytes: int
    num_read: int


def _windows(tokenizer: Any, texts: Iterable[str], max_tokens: int, length: int) -> Iterator[_Window]:
    front = _front(tokenizer)
    if length <= len(front):
        raise ValueError(
            f"sequence_length: {length} leaves no room beside the {len(front)} tokens that the tokenizer puts in "
            "front; use a larger one"
        )
    num_context = 0 if front else 1
    left = max_tokens
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = encoded["input_ids"][:left], encoded["offset_mapping"]
        step = length - len(front)
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            if len(part) > num_context:
                first = start + num_context
                # What is between two tokens belongs to the second; a character cut in two belongs to both.
                begin = min(spans[first - 1][1], spans[first][0]) if first else 0
                num_bytes = len(text[begin : spans[start + len(part) - 1][1]].encode())
                yield _Window([*front, *part], len(part) - num_context, num_bytes, len(part))
        left -= len(ids)
        if left <= 0:
            return


def _front(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    mask = encoded["special_tokens_mask"]
    return encoded["input_ids"][: mask.index(0) if 0 in mask else 0]


def _batches(windows: Iterable[_Window], batch_size: int) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    for window in windows:
        batch.append(window)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.no_grad()
def _batch_sums(model: Any, teacher: Any, batch: list[_Window]) -> dict[str, float]:
    """Sums over a batch's predicted tokens, in nat, by name."""
    width = max(len(window.ids) for window in batch)
    # Padding comes after all that is predicted: causal models need no mask for it.
    ids_RL = torch.tensor([window.ids + [0] * (width - len(window.ids)) for window in batch], device=model.device)
    predicts_RL = torch.zeros_like(ids_RL, dtype=torch.bool)
    for row, window in enumerate(batch):
        end = len(window.ids) - 1
        predicts_RL[row, end - window.num_predicted : end] = True
    targets_N = ids_RL.roll(-1, dims=1)[predicts_RL]
    models = {"nats": model} if teacher is None else {"nats": model, "teacher_nats": teacher}
    hidden = {name: _final_hidden(each, ids_RL)[predicts_RL] for name, each in models.items()}
    heads = {name: _Head(each, hidden[name]) for name, each in models.items()}
    sums: dict[str, float] = defaultdict(float)
    for start in range(0, len(targets_N), _CHUNK_TOKENS):
        rows = slice(start, start + _CHUNK_TOKENS)
        logits = {name: head.logits(hidden[name][rows]) for name, head in heads.items()}
        for name, logits_CV in logits.items():
            sums[name] += F.cross_entropy(logits_CV, targets_N[rows], reduction="sum").item()
        if teacher is not None:
            for name, kind in _DIVERGENCES.items():
                of_teacher_CV = logits["teacher_nats"]
                sums[name] += dense_divergence(logits["nats"], of_teacher_CV, kind, reduction="sum").item()
    return sums


def _final_hidden(model: Any, ids_RL: Tensor) -> Tensor:
    """Hidden states after the last norm, [R, L, E]."""
    return model.base_model(input_ids=ids_RL, use_cache=False).last_hidden_state


class _Head:
    """A model's way from hidden states to logits, in fp32 or wider."""

    def __init__(self, model: Any, hidden_NE: Tensor) -> None:
        head = model.get_output_embeddings()
        same = hidden_NE.dtype == head.weight.dtype and hidden_NE.dtype in (torch.bfloat16, torch.float16)
        self.halves = hidden_NE.is_cuda and same  # multiplied as they are, but summed and kept in fp32
        self.dtype = hidden_NE.dtype if self.halves else torch.promote_types(hidden_NE.dtype, torch.float32)
        self.weight_VE = head.weight.to(self.dtype)
        self.bias_V = getattr(head, "bias", None)
        self.rule = logit_rule_of(model.config)

    def logits(self, hidden_CE: Tensor) -> Tensor:
        options = {"out_dtype": torch.float32} if self.halves else {}
        logits_CV = torch.mm(hidden_CE.to(self.dtype), self.weight_VE.t(), **options)
        if self.bias_V is not None:
            logits_CV += self.bias_V
        logits_CV *= self.rule.scale
        if self.rule.softcap is not None:
            logits_CV = self.rule.softcap * torch.tanh(logits_CV / self.rule.softcap)
        return logits_CV


def _check(model: Any, tokenizer: Any, teacher: Any, max_tokens: int, sequence_length: int, batch_size: int) -> None:
    for name, value, least in (
        ("max_tokens", max_tokens, 2),
        ("sequence_length", sequence_length, 2),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: {value} is out of range; use at least {least}")
    for each in (model, *([teacher] if teacher is not None else [])):
        positions = getattr(each.config, "max_position_embeddings", None)
        if positions and sequence_length > positions:
            raise ValueError(
                f"sequence_length: {sequence_length} is more than the model's {positions} positions, beyond which it "
                f"was never trained; use at most {positions}"
            )
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"teacher: its vocabulary has {teacher.config.vocab_size} entries, the model's {model.config.vocab_size}; "
            "give the teacher that the model was converted from"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} does not say where in a text its tokens are, so that bytes cannot "
            "be counted; save it as a fast one (tokenizer.json)"
        )


def _read(path: Path, *, is_plain: bool) -> Iterator[str]:
    opener = _OPENERS.get(path.suffix, open)
    is_empty = True
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for text in _pieces(file) if is_plain else _lines(file, path):
                if text.strip():
                    is_empty = False
                    yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: it cannot be read to its end ({error}); it is damaged, fetch it again") from None
    if is_empty:
        raise ValueError(f"{path}: it holds no text; give a file that does")


def _pieces(file: TextIO) -> Iterator[str]:
    while lines := file.readlines(_PIECE):
        yield "".join(lines)


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        shown = line.strip() if len(line) <= 60 else line.strip()[:57] + "..."
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{place}: {shown!r} is not JSON ({error}); write an object a line") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"{place}: {shown!r} has no text; write an object with a string 'text', {{\"text\": ...}}")
        try:
            row["text"].encode()
        except UnicodeEncodeError:
            raise ValueError(f"{place}: its text holds half a character; write valid Unicode") from None
        yield row["text"]

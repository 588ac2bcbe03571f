"""Rows of many whole conversations, packed tightly, with the loss on what the assistant wrote.

A row holds documents end to end; `position_ids` restart at 0 with each, which is how attention and mixers
alike know them apart (no attention mask is needed, nor allowed). What pads a row to its full length is a
document of its own that nothing is trained on.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import torch

from hybridize.data.chat import check_chat_template, render_many
from hybridize.data.sources import ReadableData, iter_placed

_READ_AHEAD = 256  # documents tokenised at a time
_PATIENCE = 1000  # documents in a row that may be too long before an endless source is given up

PAD_TOKEN = 0
"""What fills a row up. Any token would do: nothing looks at it."""


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Packed rows, end to end; a sequence of `{"input_ids", "position_ids", "completion"}`.

    Attributes:
        input_ids: tokens of all rows, int32 [num_tokens].
        position_ids: each token's position in its document, int32 [num_tokens].
        completion: whether a token is to be predicted, bool [num_tokens]; never a document's first.
        offsets: where each row begins, and where the last one ends, int64 [num_rows + 1].
        sequence_length: most tokens of a row.
        num_dropped: documents that were longer than that and left out.
        epochs: how often the source was gone through, the last time perhaps in part.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    completion: np.ndarray
    offsets: np.ndarray
    sequence_length: int
    num_dropped: int = 0
    epochs: int = 1

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row, unpadded."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = slice(self.offsets[index], self.offsets[index + 1])
        return {
            "input_ids": self.input_ids[row],
            "position_ids": self.position_ids[row],
            "completion": self.completion[row],
        }

    def part(self, start: int, stop: int) -> "PackedRows":
        """Rows `start` up to but not `stop`, sharing memory; `num_dropped` and `epochs` stay the whole's."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"rows {start}..{stop}: there are {len(self)}; use 0 <= start <= stop <= {len(self)}")
        tokens = slice(self.offsets[start], self.offsets[stop])
        return PackedRows(
            self.input_ids[tokens],
            self.position_ids[tokens],
            self.completion[tokens],
            self.offsets[start : stop + 1] - self.offsets[start],
            self.sequence_length,
            self.num_dropped,
            self.epochs,
        )

    @property
    def stats(self) -> dict[str, int]:
        """`num_documents`, `num_dropped`, `num_tokens`, `num_completion_tokens` and `epochs`."""
        return {
            "num_documents": int((self.position_ids == 0).sum()),
            "num_dropped": self.num_dropped,
            "num_tokens": len(self.input_ids),
            "num_completion_tokens": int(self.completion.sum()),
            "epochs": self.epochs,
        }

    def digest(self) -> str:
        """A hash of all rows."""
        digest = hashlib.sha256()
        for column in (self.input_ids, self.position_ids, self.completion, self.offsets):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def collate(self, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Tensors of some rows, padded on the right.

        Args:
            rows: R of them, as `__getitem__` gives them.

        Returns:
            `input_ids` and `position_ids`, int64 [R, sequence_length]; and `valid`, bool of the same shape,
            True where the hidden state predicts a token that counts: one before each completion token.
        """
        shape = (len(rows), self.sequence_length)
        input_ids = torch.full(shape, PAD_TOKEN, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        valid = torch.zeros(shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            input_ids[i, :size] = torch.from_numpy(row["input_ids"])
            position_ids[i, :size] = torch.from_numpy(row["position_ids"])
            position_ids[i, size:] = torch.arange(self.sequence_length - size)
            valid[i, : size - 1] = torch.from_numpy(row["completion"][1:])
        return {"input_ids": input_ids, "position_ids": position_ids, "valid": valid}


def pack_rows(data: ReadableData, tokenizer: Any, sequence_length: int, num_rows: int, seed: int) -> PackedRows:
    """Pack conversations into rows of whole documents, best fit first.

    A pure function of its arguments (and the file). A conversation longer than a row is left out and counted,
    never cut: a cut trace would lack its answer. Plain text is cut. If a file has too few tokens, it is gone through
    again.

    Args:
        data: where conversations come from.
        tokenizer: with a chat template.
        sequence_length: most tokens of a row.
        num_rows: how many rows.
        seed: of the draw or order of conversations, and of the order of rows.

    Raises:
        ValueError: the data is malformed, the tokenizer cannot render it, or every conversation is too long.
    """
    if sequence_length < 2 or num_rows < 1:
        raise ValueError(f"sequence_length {sequence_length}, num_rows {num_rows}: use at least 2 and 1")
    check_chat_template(tokenizer)
    budget_tokens = num_rows * sequence_length  # so many tokens fill at least so many rows
    input_ids: list[np.ndarray] = []
    num_prompts: list[int] = []
    num_tokens, num_dropped, shortest, epochs = 0, 0, None, 1
    for document in _documents(data, tokenizer, sequence_length, seed):
        if not input_ids and (document.epoch > 1 or num_dropped >= _PATIENCE):
            raise ValueError(
                f"sequence_length {sequence_length}: all {num_dropped} conversations seen are longer, the "
                f"shortest has {shortest} tokens; use at least {shortest}, or shorter conversations"
            )
        epochs = document.epoch
        if len(document.input_ids) > sequence_length:
            num_dropped += 1
            shortest = min(shortest or len(document.input_ids), len(document.input_ids))
            continue
        input_ids.append(document.input_ids)
        num_prompts.append(max(document.num_prompt_tokens, 1))
        num_tokens += len(document.input_ids)
        if num_tokens >= budget_tokens:
            break
    rows = _pack(input_ids, num_prompts, sequence_length, num_dropped, epochs)
    order = list(range(len(rows)))
    if len(order) > num_rows:
        order.pop(int(np.diff(rows.offsets).argmin()))  # what was left over for the last row is often little
    Random(f"rows/{seed}").shuffle(order)  # packing sorts by length; training must not see that order
    return _take(rows, order[:num_rows])


@dataclass(frozen=True)
class _Document:
    """Token ids, how many of them are the prompt's, and in which round through the source they came."""

    input_ids: np.ndarray
    num_prompt_tokens: int
    epoch: int


def _documents(data: ReadableData, tokenizer: Any, sequence_length: int, seed: int) -> Iterator[_Document]:
    """The source's documents in its order, without end; each is tokenised once."""
    known: dict[str, list[tuple[np.ndarray, int]]] = {}
    conversations = iter_placed(data, seed)
    while some := list(islice(conversations, _READ_AHEAD)):
        new = {c.place: c for c in some if c.place not in known}
        chats = [c for c in new.values() if c.text is None]
        rendered = render_many(tokenizer, [c.messages for c in chats], [c.place for c in chats])
        for chat, one in zip(chats, rendered, strict=True):
            known[chat.place] = [(np.asarray(one.input_ids, dtype=np.int32), one.num_prompt_tokens)]
        for c in new.values():
            if c.text is not None:
                known[c.place] = [(part, 0) for part in _text_parts(tokenizer, c.text, sequence_length)]
        for c in some:
            for ids, num_prompt_tokens in known[c.place]:
                yield _Document(ids, num_prompt_tokens, c.epoch)


def _text_parts(tokenizer: Any, text: str, sequence_length: int) -> list[np.ndarray]:
    """Plain text as one document; where it is longer than a row, as several."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin, end = ([] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    whole = np.asarray([*begin, *ids, *end], dtype=np.int32)
    return [whole[i : i + sequence_length] for i in range(0, len(whole), sequence_length)]


def _pack(
    input_ids: list[np.ndarray],
    num_prompts: list[int],
    sequence_length: int,
    num_dropped: int,
    epochs: int,
) -> PackedRows:
    """Pack documents by TRL's best fit decreasing."""
    import pyarrow as pa
    from datasets import Dataset
    from trl import pack_dataset

    sizes = np.array([len(ids) for ids in input_ids])
    offsets = np.concatenate([[0], sizes.cumsum()])
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
    columns = {
        "input_ids": np.concatenate(input_ids),
        "position_ids": positions.astype(np.int32),
        "completion": positions >= np.repeat(num_prompts, sizes),
    }
    borders = pa.array(offsets, type=pa.int32())
    table = pa.table({name: pa.ListArray.from_arrays(borders, pa.array(c)) for name, c in columns.items()})
    with _no_progress_bars():
        packed = pack_dataset(Dataset(table), sequence_length, map_kwargs={"batch_size": len(sizes)})
    table = packed.with_format("arrow")[:]
    lists = {name: table.column(name).combine_chunks() for name in columns}
    row_sizes = lists["input_ids"].value_lengths().to_numpy()
    flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
    row_offsets = np.concatenate([[0], row_sizes.cumsum()]).astype(np.int64)
    return PackedRows(
        **flat, offsets=row_offsets, sequence_length=sequence_length, num_dropped=num_dropped, epochs=epochs
    )


def _take(rows: PackedRows, order: list[int]) -> PackedRows:
    sizes = np.diff(rows.offsets)[order]
    offsets = np.concatenate([[0], sizes.cumsum()]).astype(np.int64)
    # Where each token comes from: its row's old beginning plus its place in the row.
    sources = np.repeat(rows.offsets[order] - offsets[:-1], sizes) + np.arange(offsets[-1])
    return PackedRows(
        rows.input_ids[sources],
        rows.position_ids[sources],
        rows.completion[sources],
        offsets,
        rows.sequence_length,
        rows.num_dropped,
        rows.epochs,
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()

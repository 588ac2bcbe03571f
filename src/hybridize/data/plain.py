"""Plain text as documents to train on: whole paragraphs, every token of which is to be predicted."""

from pathlib import Path

SUFFIXES = (".txt", ".md")
"""Endings of files that are read as plain text."""

PIECE_CHARACTERS = 1000
"""Paragraphs are put together up to about so many characters."""


def is_plain(path: str) -> bool:
    """Whether a file is read as plain text, by its name's ending."""
    return path.endswith(SUFFIXES)


def read_pieces(path: str) -> list[str]:
    """A text file in pieces of whole paragraphs, in order.

    A piece ends before the paragraph with which it would have more than `PIECE_CHARACTERS`; a longer paragraph is a
    piece of its own.

    Raises:
        ValueError: the file cannot be read, or holds no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error}); convert it") from None
    pieces: list[str] = []
    for paragraph in filter(None, (part.strip() for part in text.split("\n\n"))):
        if pieces and len(pieces[-1]) + len(paragraph) + 2 <= PIECE_CHARACTERS:
            pieces[-1] += f"\n\n{paragraph}"
        else:
            pieces.append(paragraph)
    if not pieces:
        raise ValueError(f"{path}: it holds no text; give another file")
    return pieces

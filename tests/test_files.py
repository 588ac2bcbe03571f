"""A file is replaced whole or not at all."""

import os

import pytest

from hybridize.files import write_whole


@pytest.mark.parametrize("content", ["näher\n", b"\x00\xff"])
def test_write_makes_folders_and_leaves_nothing_else(tmp_path, content):
    path = tmp_path / "new" / "file"
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

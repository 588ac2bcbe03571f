"""Hybrids to serve, made once for all tests."""

import pytest
from serving_examples import make_hybrid_folder


@pytest.fixture(scope="session")
def make_served(tmp_path_factory):
    """Make the folder of a small random hybrid of Llama by its layout; the same layout is made once."""
    folders = {}

    def make(word):
        if word not in folders:
            folders[word] = make_hybrid_folder(word, tmp_path_factory.mktemp("served") / word)
        return folders[word]

    return make

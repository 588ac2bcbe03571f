"""IFEval's checks, as lm-evaluation-harness ships them, with a look first at whether they can run.

Importing the checks of lm-evaluation-harness downloads nltk's sentence splitter if it is not there; here it is an error
instead, which says what to install. The splitter decides how many sentences or capital words an answer has, so another
one in its place would give other scores.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

_PACKAGES = ("langdetect", "immutabledict", "nltk")
_SPLITTER = "tokenizers/punkt_tab"


def check_instructions() -> None:
    """Look whether IFEval's checks can run here, without a network.

    Raises:
        ImportError: a package is missing.
        ValueError: nltk's data are missing.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"hybridize_ifeval: {package} is not installed; pip install 'hybridize[eval]'")
    import nltk

    try:
        nltk.data.find(f"{_SPLITTER}/english/")
    except LookupError:
        raise ValueError(
            f"hybridize_ifeval: nltk's {_SPLITTER} is not on this machine; run python -m nltk.downloader punkt_tab "
            "where there is a network, or unpack punkt_tab.zip into a folder tokenizers and set NLTK_DATA to the "
            "folder around that"
        ) from None


def share_of_instructions(answers: Sequence[Sequence[bool]]) -> float:
    """Share of followed instructions, over those of all answers together."""
    followed = [each for answer in answers for each in answer]
    return sum(followed) / len(followed)


def follow_instructions(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, Any]:
    """Which instructions a reply follows.

    Args:
        doc: a row of `load_ifeval`.
        replies: one.

    Returns:
        By metric: `prompt_level_*`, whether it follows all; `inst_level_*`, whether each. `strict` is the reply as it
        is, `loose` its best of eight variants without asterisks, first or last line.
    """
    from langdetect import DetectorFactory
    from lm_eval.tasks.ifeval.utils import process_results

    DetectorFactory.seed = 0  # it draws by chance, and would give the same text another language next time
    return process_results(doc, replies)

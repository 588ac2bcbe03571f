"""What models are asked to serve, and which are compared: scenarios, layouts as words, shapes; imports no torch."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """So many tokens are read and so many are written, by each of a crowd of sequences that start together.

    Attributes:
        prompt_tokens: of each sequence.
        new_tokens: generated for each.
    """

    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Of a sequence when it is complete."""
        return self.prompt_tokens + self.new_tokens

    def __str__(self) -> str:
        return f"{_short(self.prompt_tokens)} -> {_short(self.new_tokens)}"


SCENARIOS: tuple[Scenario, ...] = (Scenario(1, 16384), Scenario(1024, 8192), Scenario(8192, 16384))
"""Those of the paper (arXiv 2511.02651)."""

SMALL_SCENARIOS: tuple[Scenario, ...] = (Scenario(1, 96), Scenario(64, 96))
"""For a pocket shape on a CPU."""

SHAPES: dict[str, dict[str, Any]] = {
    "apriel-15b": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_hidden_layers": 50,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "pocket": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}
"""Teachers without weights, as their configs: the paper's, and one that a CPU serves in seconds."""

_MOST_TOKENS = 10**9

TEACHER = "teacher"

PAPER_LAYOUTS: dict[str, str] = {
    "H-25": "am*25",
    "H-30": "mmama*10",
    "H-40": "ammmm*10",
    "H-30-gdn": "ggaga*10",
    "H-40-gdn": "agggg*10",
}
"""The paper's numbers of layers, spread evenly: speed does not depend on which layers they are."""

SMALL_LAYOUTS: dict[str, str] = {"H-2": "am*2", "H-3-gdn": "aggg"}


def read_scenarios(words: Iterable[str]) -> tuple[Scenario, ...]:
    """Read scenarios that are written as `prompt:new`, e.g. `1:16384` or `1k:8k`.

    Raises:
        ValueError: a word is no scenario, or is of more than a billion tokens; says how one is written.
    """
    scenarios = []
    for word in words:
        match = re.fullmatch(r"([0-9]{1,9})(k?):([0-9]{1,9})(k?)", word.strip())
        sizes = [int(match[i]) * (1024 if match[i + 1] else 1) for i in (1, 3)] if match else [0]
        if min(sizes) < 1 or max(sizes) > _MOST_TOKENS:
            raise ValueError(f"--scenario: {word!r} is no scenario; write prompt:new tokens, e.g. 1:16384 or 1k:8k")
        scenarios.append(Scenario(*sizes))
    return tuple(dict.fromkeys(scenarios))


def read_layouts(words: Iterable[str], defaults: Mapping[str, str], num_layers: int) -> dict[str, str]:
    """Read layouts that are written as one letter per layer, `name=word`; `am*25` is `am` 25 times.

    Args:
        words: as the user gave them; without a name, a layout is called by its word.
        defaults: taken where there are none.
        num_layers: of the teacher.

    Returns:
        Whole words by name; the teacher comes first, as attention everywhere.

    Raises:
        ValueError: a name is taken, or a word has another number of letters than the teacher has layers.
    """
    layouts = {TEACHER: "a" * num_layers}
    given = [word.partition("=") if "=" in word else (word, "=", word) for word in words]
    for name, _, short in given or [(name, "=", word) for name, word in defaults.items()]:
        if not name or name in layouts:
            raise ValueError(f"--layout: the name {name!r} is empty or taken; give each layout a name of its own")
        if "/" in name:
            raise ValueError(f"--layout: the name {name!r} has a slash; leave it out, since files are called by it")
        pattern, star, times = short.partition("*")
        if star and not re.fullmatch("[0-9]{1,4}", times):
            raise ValueError(f"--layout: {short!r} repeats {times!r} times; write e.g. am*25")
        word = pattern * int(times or 1)
        if len(word) != num_layers:
            raise ValueError(
                f"--layout: {short!r} has {len(word)} layers, the teacher {num_layers}; use one letter each"
            )
        layouts[name] = word
    return layouts


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)

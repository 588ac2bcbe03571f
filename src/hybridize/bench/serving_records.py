"""What `hybridize bench serve` has measured, read back: a file of JSON lines that killed writers may have torn."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.bench.scenarios import Scenario

SERVING_FILE = "serving.jsonl"
"""What it is called where the user says nothing else; with `--run`, in the run's folder."""


@dataclass(frozen=True)
class Speed:
    """What was measured of one layout in one scenario.

    Attributes:
        model: whose layout it is.
        layout: one letter per layer.
        scenario: what each sequence reads and writes.
        sequences: at a time.
        tokens_per_second: of all sequences, the median of the repeats.
        repeats: tokens per second of each.
        device: a GPU's name, or `cpu`.
        vllm: its version.
        method: `sampled` or `whole`.
        utilization: share of the GPU's memory for vLLM.
        max_sequences: no more were asked for; None: as many as the memory holds.
        step_tokens: most tokens of a step that were asked for; None: vLLM's own.
        state_dtype: of the recurrences' states.
        weight_bytes: of the model.
        state_bytes: of a sequence, in all layers.
        windows: of the layers that attend, in tokens, None for the whole context; empty if all attend to all of it.
    """

    model: str
    layout: str
    scenario: Scenario
    sequences: int
    tokens_per_second: float
    repeats: tuple[float, ...]
    device: str
    vllm: str
    method: str
    utilization: float | None
    max_sequences: int | None
    step_tokens: int | None
    state_dtype: str
    weight_bytes: int
    state_bytes: int
    windows: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Speed":
        """Read a record.

        Raises:
            ValueError: it lacks something, or holds what cannot be.
        """
        try:
            asked = record.get("asked") or {}
            rate, repeats = float(record["tokens_per_second"]), tuple(map(float, record["tokens_per_second_repeats"]))
            found = cls(
                model=str(record["model"]),
                layout=str(record["layout"]),
                scenario=Scenario(int(record["prompt_tokens"]), int(record["new_tokens"])),
                sequences=int(record["sequences"]),
                tokens_per_second=rate,
                repeats=repeats,
                device=str(record["device"]),
                vllm=str(record["vllm"]),
                method=str(record["method"]),
                utilization=asked.get("utilization", record.get("utilization")),
                max_sequences=asked.get("max_sequences"),
                step_tokens=asked.get("step_tokens"),
                state_dtype=str(record["state_dtype"]),
                weight_bytes=int(record["weight_bytes"]),
                state_bytes=int(record["state_bytes"]),
                windows=tuple(asked.get("windows") or ()),
            )
        except KeyError as missing:
            raise ValueError(f"it has no {missing}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(str(error)) from None
        if not repeats or not 0 < min(repeats) <= rate <= max(repeats) < float("inf"):
            raise ValueError(f"{rate} tokens per second are not within the repeats, {list(repeats)}")
        return found


def read_records(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a file, and what was left out of it, in words: lines that a killed process left unfinished."""
    records, notes = [], []
    for number, line in enumerate(file.read_text(errors="replace").split("\n") if file.is_file() else (), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            notes.append(f"{file.name}, line {number}: not whole, as a killed process leaves it; left out")
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            notes.append(f"{file.name}, line {number}: no record; left out")
    return records, notes


def read_speeds(file: Path) -> tuple[list[Speed], list[str]]:
    """What a file says was measured, in its order, and what was left out of it, in words."""
    records, notes = read_records(file)
    speeds = []
    for record in records:
        try:
            speeds.append(Speed.of(record))
        except ValueError as error:
            notes.append(f"{file.name}, record of {record.get('model', 'no model')}: {error}; left out")
    return speeds, notes

"""Make training data: a model answers prompts, the answers are verified, the right ones are kept with their provenance.

Each batch leaves a part, whole or not at all, in `parts/`, with every answer and the verifier's word. What is asked
and in which batches is a function of the arguments, so a killed call goes on after its last part and ends with the very
bytes of a call that was never killed. When all parts are there, `traces.parquet` is made of them.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hybridize.data.chat import render_many
from hybridize.data.generation import (
    Engine,
    Generated,
    GenerationSettings,
    Request,
    TransformersEngine,
    VllmEngine,
    cut_batches,
    make_requests,
    max_positions,
)
from hybridize.data.sources import Prompt
from hybridize.data.verify import Verifier, load_verifier
from hybridize.files import write_whole
from hybridize.spec.base import StoppedError
from hybridize.spec.data import TRACES_FILE
from hybridize.spec.stages import TracesStage

PARTS_FOLDER = "parts"
_PLAN_FILE = "plan"
_WINDOW_BATCHES = 16  # answers are sorted by length within so many batches: what is written at a time, in order

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("messages", _MESSAGES),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("answer", pa.string()),
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("tokens", pa.int32()),
        ("ended", pa.bool_()),
        ("model", pa.string()),
        ("verifier", pa.string()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("seed", pa.int64()),
        ("engine", pa.string()),
    ]
)
"""Columns of `traces.parquet`: the chat, its last prompt and the completion, the reference answer, the row's id, the
number of the sample, its tokens, whether the model ended it by itself, and where it comes from."""

_PART_SCHEMA = pa.schema([("number", pa.int64()), ("verified", pa.bool_()), ("task", pa.string()), *SCHEMA])


def make_traces(
    model: Any,
    tokenizer: Any,
    stage: TracesStage,
    prompts: Sequence[Prompt],
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
    model_name: str = "",
) -> dict[str, Any]:
    """Let a model answer prompts and keep the verified answers in `traces.parquet`, ordered by prompt and sample.

    Args:
        model: a causal language model; for the engine `vllm`, its path or name, since vLLM loads it.
        tokenizer: its tokenizer, with a chat template.
        stage: how to sample and verify.
        prompts: at least one, as `hybridize.data.sources.read_prompts` gives them.
        folder: where `parts/` and `traces.parquet` go. Parts of a killed call with the same arguments are gone on from;
            the folder of parts may be removed afterwards.
        on_progress: called with (answers, of how many) after each batch, those of an earlier call included.
        model_name: how a trace calls the model; by default, where it was loaded from.

    Returns:
        `prompts`, `samples` (answers), `verified` (kept), `pass_rate`, `truncated` (cut by the limit of tokens),
        `tokens` (generated, of all answers), `verified_tokens`, `solved_prompts` (with a right answer), and for the
        reasoning world `tasks`: `samples` and `verified` of each.

    Raises:
        ValueError: no prompts, or one that is too long; a setting, the chat template or the verifier does not fit.
        ImportError: a library that the engine or the verifier needs is missing.
        StoppedError: no answer was verified.
    """
    if not prompts:
        raise ValueError("prompts: none were given; give data with at least one")
    settings = GenerationSettings(
        stage.max_new_tokens, stage.temperature, stage.top_p, stage.samples_per_prompt, stage.seed
    )
    # What would fail after hours of generation is tried before.
    rendered = _render(tokenizer, prompts)
    verifier = load_verifier(stage.verifier, prompts)
    try:
        requests = make_requests(rendered, settings, max_positions(model), [prompt.place for prompt in prompts])
        windows = _cut_windows(requests, stage.batch_size)
        provenance = {
            "model": model_name or _name_of(model),
            "verifier": verifier.name,
            "temperature": stage.temperature,
            "top_p": stage.top_p,
            "seed": stage.seed,
            "engine": stage.engine,
        }
        parts = folder / PARTS_FOLDER
        plan = [settings, stage.batch_size, provenance, [(p.id, p.answer) for p in prompts], rendered]
        _check_plan(parts / _PLAN_FILE, plan)
        stats = _make_parts(
            lambda: _make_engine(stage, model, tokenizer, settings, requests),
            requests,
            prompts,
            windows,
            verifier,
            provenance,
            parts,
            on_progress,
        )
    finally:
        verifier.close()
    if not stats["verified"]:
        raise StoppedError(_explain_none(stats, verifier, settings))
    _write_traces(folder / TRACES_FILE, parts, windows)
    return {"prompts": len(prompts), **stats}


def _render(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, after a look at whether a trace of it could be rendered for training."""
    traces = [[*prompt.messages, {"role": "assistant", "content": "x"}] for prompt in prompts]
    rendered = render_many(tokenizer, traces, [prompt.place for prompt in prompts])
    return [one.input_ids[: one.num_prompt_tokens] for one in rendered]


def _make_engine(
    stage: TracesStage, model: Any, tokenizer: Any, settings: GenerationSettings, requests: Sequence[Request]
) -> Engine:
    if stage.engine == "vllm":
        if not isinstance(model, str):
            raise ValueError(f"engine vllm: it loads the model itself; give its path, not a {type(model).__name__}")
        longest = max(len(request.input_ids) + request.max_new_tokens for request in requests)
        return VllmEngine(model, tokenizer, settings, longest)
    return TransformersEngine(model, tokenizer, settings)


def _make_parts(
    make_engine: Callable[[], Engine],
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
    windows: list[list[list[int]]],
    verifier: Verifier,
    provenance: dict[str, Any],
    parts: Path,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Make each part that is not there yet, and count what is in all of them."""
    engine: Engine | None = None
    counts: Counter[str] = Counter()
    tasks: dict[str, Counter[str]] = {}
    solved: set[int] = set()
    for file, batch in _part_files(parts, windows):
        table = _read_part(file)
        if table is None:
            engine = engine or make_engine()  # not before there is something to do: vLLM takes a minute to load
            answers = engine.generate([requests[i] for i in batch])
            rows = []
            for i, generated in zip(batch, answers, strict=True):
                prompt = prompts[requests[i].prompt]
                rows.append(_row(i, prompt, requests[i], generated, verifier(prompt, generated)) | provenance)
            table = pa.Table.from_pylist(rows, schema=_PART_SCHEMA)
            write_whole(file, _to_bytes(table))
        for row in table.select(["number", "verified", "ended", "tokens", "task"]).to_pylist():
            counted = {"samples": 1, "verified": int(row["verified"])}
            counts.update(counted, truncated=int(not row["ended"]), tokens=row["tokens"])
            if row["verified"]:
                counts["verified_tokens"] += row["tokens"]
                solved.add(requests[row["number"]].prompt)
            if row["task"]:
                tasks.setdefault(row["task"], Counter()).update(counted)
        if on_progress:
            on_progress(counts["samples"], len(requests))
    names = ("samples", "verified", "truncated", "tokens", "verified_tokens")
    stats: dict[str, Any] = {name: counts[name] for name in names}
    stats |= {"pass_rate": counts["verified"] / counts["samples"], "solved_prompts": len(solved)}
    if tasks:
        stats["tasks"] = {task: dict(tasks[task]) for task in sorted(tasks)}
    return stats


def _row(number: int, prompt: Prompt, request: Request, generated: Generated, verified: bool) -> dict[str, Any]:
    return {
        "number": number,
        "verified": verified,
        "task": prompt.problem.task if prompt.problem else None,
        "messages": [*prompt.messages, {"role": "assistant", "content": generated.text}],
        "prompt": prompt.text,
        "completion": generated.text,
        "answer": prompt.answer,
        "id": prompt.id,
        "sample": request.sample,
        "tokens": generated.num_tokens,
        "ended": generated.ended,
    }


def _cut_windows(requests: Sequence[Request], batch_size: int) -> list[list[list[int]]]:
    """Windows of consecutive requests, each cut into batches of similar length: numbers of requests."""
    windows, size = [], _WINDOW_BATCHES * batch_size
    for begin in range(0, len(requests), size):
        batches = cut_batches(requests[begin : begin + size], batch_size)
        windows.append([[begin + i for i in batch] for batch in batches])
    return windows


def _part_files(parts: Path, windows: list[list[list[int]]]) -> Iterator[tuple[Path, list[int]]]:
    for w, window in enumerate(windows):
        for b, batch in enumerate(window):
            yield _part_file(parts, w, b), batch


def _part_file(parts: Path, window: int, batch: int) -> Path:
    return parts / f"{window:06d}-{batch:02d}.parquet"


def _read_part(file: Path) -> pa.Table | None:
    """A part; None if it is not there, or damaged, in which case it is made again."""
    try:
        with pq.ParquetFile(file) as part:
            return part.read()
    except (OSError, pa.ArrowException):
        return None


def _check_plan(file: Path, plan: Any) -> None:
    """Parts belong to one set of arguments; others must not go on from them."""
    digest = hashlib.sha256(json.dumps(plan, default=str).encode()).hexdigest()
    if file.is_file() and file.read_text() != digest:
        raise ValueError(
            f"{file.parent}: its parts were made with other prompts or settings; remove the folder, or give those again"
        )
    write_whole(file, digest)


def _to_bytes(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def _write_traces(path: Path, parts: Path, windows: list[list[list[int]]]) -> None:
    """One file of all verified answers, in order; a window is in memory at a time and becomes a row group."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            with pq.ParquetWriter(stream, SCHEMA, compression="zstd") as writer:
                for w, window in enumerate(windows):
                    answers = pa.concat_tables(_read_part(_part_file(parts, w, b)) for b in range(len(window)))
                    kept = answers.filter(answers["verified"]).sort_by("number")
                    if kept.num_rows:
                        writer.write_table(kept.select(SCHEMA.names).combine_chunks(), row_group_size=kept.num_rows)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _name_of(model: Any) -> str:
    return model if isinstance(model, str) else str(getattr(model, "name_or_path", "") or type(model).__name__)


def _explain_none(stats: dict[str, Any], verifier: Verifier, settings: GenerationSettings) -> str:
    samples, truncated = stats["samples"], stats["truncated"]
    if 2 * truncated > samples:
        remedy = f"{truncated} did not end within max_new_tokens {settings.max_new_tokens}: raise it"
    else:
        remedy = "look at some answers: easier prompts, a better model or more samples_per_prompt may help"
    return f"traces: none of {samples} answers was verified by {verifier.name}; {remedy}"

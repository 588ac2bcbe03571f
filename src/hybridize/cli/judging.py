"""Verbs that look at a model: evaluate, throughput."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridize.cli.options import check_new_file, make_stage

_ModelArgument = Annotated[str, typer.Argument(help="Folder of a teacher or a hybrid.")]
_OutOption = Annotated[Path | None, typer.Option(help="Write the figures here too, as JSON.")]


def evaluate(
    model: _ModelArgument,
    level: Annotated[int, typer.Option(help="Difficulty in the reasoning world, 1..8.")] = 2,
    levels: Annotated[
        str | None, typer.Option(help="Difficulty by task, where it is another, e.g. swaps=4,recall=5.")
    ] = None,
    problems: Annotated[int, typer.Option(help="Unseen problems per task.")] = 250,
    tasks: Annotated[str, typer.Option(help="Tasks, by comma.")] = "quantities,addition,swaps,recall",
    samples: Annotated[int, typer.Option(help="Answers to each problem; above 1 gives pass@k.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 0.0,
    harness: Annotated[
        str | None, typer.Option(help="Instead: tasks of lm-evaluation-harness, by comma, e.g. hybridize_gsm8k.")
    ] = None,
    benchmarks: Annotated[Path | None, typer.Option(help="Folder of the offline benchmarks, for --harness.")] = None,
    limit: Annotated[int | None, typer.Option(help="Problems of each task, for --harness.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of each answer, thinking included, for --harness; default: the task's own.")
    ] = None,
    backend: Annotated[str, typer.Option(help="hf, or vllm where it is installed, for --harness.")] = "hf",
    text: Annotated[Path | None, typer.Option(help="Instead: perplexity on a text file (.txt, .jsonl, .xz).")] = None,
    teacher: Annotated[str | None, typer.Option(help="Measure the divergence from it too, for --text.")] = None,
    batch_size: Annotated[int, typer.Option(help="Problems at a time.")] = 64,
    out: _OutOption = None,
) -> None:
    """Judge a model: by what it generates on unseen problems, by the harness, or by its perplexity on text."""
    from hybridize.pipeline.progress import Reporter, quiet_libraries

    quiet_libraries()
    if out:
        check_new_file(out)
    if harness is not None and text is not None:
        raise ValueError("evaluate: --harness and --text are two ways to judge; give one at a time")
    if harness is not None:
        measured = _by_harness(model, harness, benchmarks, limit, max_new_tokens, backend, batch_size)
    elif text is not None:
        from hybridize.pipeline.stages.judging import text_of_model

        stage = make_stage("text", model="model", text=str(text), batch_size=min(batch_size, 4))
        measured = text_of_model(stage, model, teacher, model, Reporter())
        for name, value in measured.items():
            typer.echo(f"{name:20} {value:,.4f}" if isinstance(value, float) else f"{name:20} {value:,}")
    else:
        measured = _by_generation(model, level, levels, problems, tasks, samples, temperature, batch_size)
    _write(out, measured)


def _by_generation(
    model: str,
    level: int,
    levels: str | None,
    problems: int,
    tasks: str,
    samples: int,
    temperature: float,
    batch_size: int,
) -> dict[str, Any]:
    from hybridize.data.world import TASKS
    from hybridize.pipeline.progress import Reporter
    from hybridize.pipeline.stages.judging import evaluate_model
    from hybridize.spec.base import choose

    names = tuple(choose("--tasks", name.strip(), TASKS) for name in tasks.split(","))
    stage = make_stage(
        "evaluate",
        model="model",
        level=level,
        levels=_read_levels(levels),
        problems_per_task=problems,
        tasks=names,
        batch_size=batch_size,
        samples=samples,
        temperature=temperature,
    )
    summary = evaluate_model(stage, model, model, Reporter())
    for name, score in {"overall": summary["overall"], **summary["tasks"]}.items():
        typer.echo(
            f"{name:12} {score['correct']:5} of {score['total']:5}  {score['accuracy']:6.1%}  "
            f"[{score['low']:.1%}, {score['high']:.1%}]  by right steps {score['steps_correct']}"
        )
    return summary


def _read_levels(text: str | None) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")] if text else []
        return {task.strip(): int(level) for task, level in pairs}
    except ValueError:
        raise ValueError(f"--levels: {text!r} is no list of tasks and levels; write e.g. swaps=4,recall=5") from None


def _by_harness(
    model: str,
    tasks: str,
    benchmarks: Path | None,
    limit: int | None,
    max_new_tokens: int | None,
    backend: str,
    batch_size: int,
) -> dict[str, Any]:
    from hybridize.pipeline.progress import Reporter
    from hybridize.pipeline.stages.judging import harness_model

    stage = make_stage(
        "harness",
        model="model",
        tasks=tuple(name.strip() for name in tasks.split(",")),
        benchmarks=str(benchmarks) if benchmarks else None,
        limit=limit,
        max_new_tokens=max_new_tokens,
        backend=backend,
        batch_size=batch_size,
    )
    measured = harness_model(stage, model, Reporter())
    for task, score in measured["tasks"].items():
        error = f" ± {score['stderr']:.4f}" if score["stderr"] is not None else ""
        typer.echo(f"{task:24} {score['metric']:24} {score['value']:.4f}{error}  of {score['num_samples']}")
    return measured


def throughput(
    model: _ModelArgument,
    batch_size: Annotated[int, typer.Option(help="Sequences generated at a time.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Generated for each.")] = 1024,
    repeats: Annotated[int, typer.Option(help="Measurements; the median counts.")] = 3,
    out: _OutOption = None,
) -> None:
    """Measure how fast a model generates, with transformers."""
    from hybridize.pipeline.progress import Reporter, quiet_libraries
    from hybridize.pipeline.stages.judging import throughput_of_model

    quiet_libraries()
    if out:
        check_new_file(out)
    stage = make_stage(
        "throughput",
        model="model",
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
    )
    measured = throughput_of_model(stage, model, Reporter())
    typer.echo(f"{measured['tokens_per_second']:,.1f} tokens/s")
    _write(out, measured)


def _write(out: Path | None, measured: dict[str, Any]) -> None:
    from hybridize.files import write_whole
    from hybridize.pipeline.artifacts import writing

    if out:
        with writing(out):
            write_whole(out, json.dumps(measured, indent=1))

"""Verbs that make training data and train: traces, fit, distill, sft."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hybridize.cli.options import (
    DataOption,
    OutArgument,
    SeedOption,
    SetOption,
    TeacherArgument,
    make_stage,
    model_input,
    run_alone,
)

_StudentArgument = Annotated[Path, typer.Argument(help="Folder of the hybrid.")]
_StepsOption = Annotated[int, typer.Option(help="Optimiser steps.")]
_TokensOption = Annotated[int, typer.Option(help="Tokens of a step.")]
_LengthOption = Annotated[int, typer.Option(help="Tokens of a packed row.")]
_RowsOption = Annotated[int, typer.Option(help="Rows computed at a time.")]
_RateOption = Annotated[float, typer.Option(help="Peak learning rate.")]
_SaveOption = Annotated[int, typer.Option(help="Steps between checkpoints.")]


def traces(
    teacher: TeacherArgument,
    out: OutArgument,
    num_prompts: Annotated[int, typer.Option(help="Prompts to answer.")] = 1000,
    samples: Annotated[int, typer.Option(help="Answers to each.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 0.6,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 2048,
    verifier: Annotated[str, typer.Option(help="auto, world, math, none, or file.py:function.")] = "auto",
    engine: Annotated[str, typer.Option(help="transformers, or vllm where it is installed.")] = "transformers",
    batch_size: Annotated[int, typer.Option(help="Answers generated at a time.")] = 64,
    data: DataOption = None,
    seed: SeedOption = 0,
    settings: SetOption = None,
) -> None:
    """Let the teacher answer prompts and keep the verified answers, for training."""
    from hybridize.spec.data import TRACES_FILE

    stage = make_stage(
        "traces",
        settings,
        num_prompts=num_prompts,
        samples_per_prompt=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        verifier=verifier,
        engine=engine,
        batch_size=batch_size,
        seed=seed,
    )
    metrics = run_alone(stage, teacher, data, out).metrics
    typer.echo(f"{metrics['verified']:,} of {metrics['samples']:,} answers kept: {out / TRACES_FILE}")


def fit(
    student: _StudentArgument,
    teacher: TeacherArgument,
    out: OutArgument,
    steps: _StepsOption,
    tokens_per_step: _TokensOption = 16384,
    sequence_length: _LengthOption = 16384,
    rows_per_batch: _RowsOption = 1,
    learning_rate: _RateOption = 1e-3,
    save_every: _SaveOption = 100,
    data: DataOption = None,
    seed: SeedOption = 0,
    settings: SetOption = None,
) -> None:
    """Fit each new mixer alone to the output of the attention it replaced; cheap, before distillation."""
    stage = make_stage(
        "fit",
        settings,
        model="student",
        steps=steps,
        tokens_per_step=tokens_per_step,
        sequence_length=sequence_length,
        rows_per_batch=rows_per_batch,
        learning_rate=learning_rate,
        save_every=save_every,
        seed=seed,
    )
    run_alone(stage, teacher, data, out, {"student": model_input(student)})
    typer.echo(f"fitted: {out}")


def distill(
    student: _StudentArgument,
    teacher: TeacherArgument,
    out: OutArgument,
    steps: _StepsOption,
    tokens_per_step: _TokensOption = 64 * 16384,
    sequence_length: _LengthOption = 16384,
    rows_per_batch: _RowsOption = 1,
    learning_rate: _RateOption = 5e-6,
    loss: Annotated[str, typer.Option(help="reverse_kl (the paper's), forward_kl or jsd.")] = "reverse_kl",
    train: Annotated[str, typer.Option(help="all weights (the paper), or mixers only.")] = "all",
    on_policy: Annotated[bool, typer.Option(help="Distil on the student's own answers to the prompts.")] = False,
    save_every: _SaveOption = 100,
    data: DataOption = None,
    seed: SeedOption = 0,
    settings: SetOption = None,
) -> None:
    """Train a hybrid to follow its teacher, token by token."""
    sizes: dict[str, Any] = {"tokens_per_step": tokens_per_step, "sequence_length": sequence_length}
    stage = make_stage(
        "on_policy" if on_policy else "distill",
        settings,
        model="student",
        steps=steps,
        rows_per_batch=rows_per_batch,
        learning_rate=learning_rate,
        loss=loss,
        train=train,
        save_every=save_every,
        seed=seed,
        **({} if on_policy else sizes),
    )
    run_alone(stage, teacher, data, out, {"student": model_input(student)})
    typer.echo(f"distilled: {out}")


def sft(
    model: Annotated[Path, typer.Argument(help="Folder of a hybrid or a teacher.")],
    out: OutArgument,
    steps: _StepsOption,
    tokens_per_step: _TokensOption = 64 * 16384,
    sequence_length: _LengthOption = 16384,
    rows_per_batch: _RowsOption = 1,
    learning_rate: _RateOption = 5e-6,
    teacher_control: Annotated[
        Path | None, typer.Option(help="Do the same to this unconverted teacher, into OUT-teacher, as a control.")
    ] = None,
    save_every: _SaveOption = 100,
    data: DataOption = None,
    seed: SeedOption = 0,
    settings: SetOption = None,
) -> None:
    """Fine-tune a model on traces, completion only."""
    stage = make_stage(
        "sft",
        settings,
        model="student",
        steps=steps,
        tokens_per_step=tokens_per_step,
        sequence_length=sequence_length,
        rows_per_batch=rows_per_batch,
        learning_rate=learning_rate,
        save_every=save_every,
        seed=seed,
    )
    targets = [(model, out)]
    if teacher_control is not None:
        targets.append((teacher_control, out.with_name(f"{out.name}-teacher")))
    inputs = [model_input(source) for source, _ in targets]
    for (source, folder), artifact in zip(targets, inputs, strict=True):
        run_alone(stage, str(source), data, folder, {"student": artifact})
        typer.echo(f"fine-tuned: {folder}")

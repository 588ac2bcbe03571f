"""The stages that look at a model: generated answers, harness tasks, text, speed."""

import json
from pathlib import Path
from typing import Any

from hybridize.files import write_whole
from hybridize.pipeline.job import Job, check_checkpoint, device, load_tokenizer, working_dtype
from hybridize.pipeline.progress import Reporter
from hybridize.spec.stages import TEACHER, EvaluateStage, HarnessStage, TextStage, ThroughputStage

EVALUATION_FILE = "evaluation.json"


def run_evaluate(stage: EvaluateStage, job: Job, folder: Path) -> dict[str, Any]:
    """Let a model answer unseen problems and judge its replies."""
    return _keep(folder, evaluate_model(stage, job.model_path(stage.model), job.teacher, job.reporter))


def evaluate_model(stage: EvaluateStage, model_path: str, tokenizer_path: str, reporter: Reporter) -> dict[str, Any]:
    """Judge the model at a path as the stage says; the scores of `hybridize.evaluation.evaluate_problems`."""
    from hybridize.data.chat import check_chat_template
    from hybridize.data.world import draw_problem
    from hybridize.evaluation import evaluate_problems

    tokenizer = load_tokenizer(tokenizer_path)
    check_chat_template(tokenizer)
    model = _ready(model_path)
    problems = [
        draw_problem(task, stage.level_of(task), "test", index)
        for task in stage.tasks
        for index in range(stage.problems_per_task)
    ]
    with reporter.bar("answering") as advance:
        return evaluate_problems(
            model,
            tokenizer,
            problems,
            stage.batch_size,
            advance,
            samples=stage.samples,
            temperature=stage.temperature,
            seed=stage.seed,
        )


def run_harness(stage: HarnessStage, job: Job, folder: Path) -> dict[str, Any]:
    """Judge a model with lm-evaluation-harness."""
    return _keep(folder, harness_model(stage, job.model_path(stage.model), job.reporter))


def harness_model(stage: HarnessStage, model_path: str, reporter: Reporter) -> dict[str, Any]:
    """Judge the model at a path with lm-evaluation-harness as the stage says."""
    from hybridize.evaluation.harness import run_harness as evaluate_with_harness

    check_checkpoint(model_path)
    with reporter.bar("answering") as advance:
        measured = evaluate_with_harness(
            model_path,
            stage.tasks,
            backend=stage.backend,
            limit=stage.limit,
            batch_size=stage.batch_size,
            benchmarks=stage.benchmarks,
            max_new_tokens=stage.max_new_tokens,
            on_progress=advance,
        )
    for warning in measured["warnings"]:
        reporter.say(f"  {warning}")
    return measured


def run_text(stage: TextStage, job: Job, folder: Path) -> dict[str, Any]:
    """Measure a model's perplexity on text, and how far it is from the teacher there."""
    teacher = None if stage.model == TEACHER else job.teacher
    return _keep(folder, text_of_model(stage, job.model_path(stage.model), teacher, job.teacher, job.reporter))


def text_of_model(
    stage: TextStage, model_path: str, teacher_path: str | None, tokenizer_path: str, reporter: Reporter
) -> dict[str, Any]:
    """Perplexity of the model at a path, and its divergence from a teacher if one is given."""
    from hybridize.evaluation.text import evaluate_text, read_texts

    tokenizer = load_tokenizer(tokenizer_path)
    model = _ready(model_path)
    teacher = _ready(teacher_path) if teacher_path else None
    with reporter.bar("reading") as advance:
        return evaluate_text(
            model,
            tokenizer,
            read_texts(stage.text),
            teacher=teacher,
            max_tokens=stage.max_tokens,
            sequence_length=stage.sequence_length,
            batch_size=stage.batch_size,
            on_progress=advance,
        )


def run_throughput(stage: ThroughputStage, job: Job, folder: Path) -> dict[str, Any]:
    """Measure how fast a model generates."""
    return _keep(folder, throughput_of_model(stage, job.model_path(stage.model), job.reporter))


def throughput_of_model(stage: ThroughputStage, model_path: str, reporter: Reporter) -> dict[str, Any]:
    """Speed of the model at a path, as the stage says, with the CPU `threads` that it was measured with."""
    import torch

    from hybridize.bench import measure_throughput

    model = _ready(model_path)
    with reporter.bar("generating") as advance:
        measured = measure_throughput(
            model,
            batch_size=stage.batch_size,
            prompt_tokens=stage.prompt_tokens,
            new_tokens=stage.new_tokens,
            repeats=stage.repeats,
            on_progress=advance,
        )
    return measured | {"threads": torch.get_num_threads()}


def _ready(path: str) -> Any:
    """A model in the working precision, on the working device."""
    from hybridize.models import load_model

    check_checkpoint(path)
    return load_model(path, dtype=working_dtype()).to(device())


def _keep(folder: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Write what was measured beside the manifest, which holds it too."""
    write_whole(folder / EVALUATION_FILE, json.dumps(measured, indent=1))
    return measured

"""The stage that ranks layers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridize.pipeline.job import Job, check_same_vocabulary, working_dtype
from hybridize.spec.data import TracesDataSpec
from hybridize.spec.mixers import AttentionSpec
from hybridize.spec.stages import TEACHER, RankStage

RANKING_FILE = "ranking.json"

_READS_ROWS = ("mmr", "kl", "window", "perplexity", "loo")
_TRAINS = ("mmr", "kl")


def run_rank(stage: RankStage, job: Job, folder: Path) -> dict[str, Any]:
    """Rank a model's layers into `ranking.json`."""
    from hybridize.data.chat import check_chat_template
    from hybridize.data.packing import pack_rows
    from hybridize.importance import rank_cost, rank_layers, save_ranking
    from hybridize.models import layout_of

    teacher = job.load_teacher()
    model = teacher
    if stage.model != TEACHER:
        model = job.load_model(stage.model, dtype=working_dtype()).to(teacher.device).requires_grad_(False)
        check_same_vocabulary(model, teacher, job.model_path(stage.model), job.teacher)
    tokenizer = job.tokenizer()
    batches: list[Any] = []
    heldout: list[Any] = []
    judge: Callable[[Any], float] | None = None
    if stage.method in _READS_ROWS:
        check_chat_template(tokenizer)
        attention = [i for i, mixer in enumerate(layout_of(model.config).layers) if isinstance(mixer, AttentionSpec)]
        cost = rank_cost(teacher.config.num_hidden_layers, stage, attention)
        job.reporter.say(f"  {describe_cost(cost)}")
        if stage.method == "loo" and stage.score == "world":
            judge = _judge(stage, tokenizer)
        else:
            trained = stage.steps * stage.rows_per_step if stage.method in _TRAINS else 0
            rows = pack_rows(
                job.data_of(stage), tokenizer, stage.sequence_length, trained + stage.heldout_rows, stage.seed
            )
            batches = _batches(rows.part(stage.heldout_rows, len(rows)), stage.rows_per_step)
            heldout = _batches(rows.part(0, stage.heldout_rows), stage.rows_per_step)
    with job.reporter.bar("ranking") as advance:
        ranking = rank_layers(
            model,
            teacher,
            batches,
            heldout,
            stage,
            state_dir=folder / "layers",
            on_progress=advance,
            checkpoint=stage.gradient_checkpointing,
            judge=judge,
        )
    ranking = replace(ranking, settings={**ranking.settings, **_prints(stage, job)})
    save_ranking(ranking, folder / RANKING_FILE)
    return {"order": list(ranking.order or ()), "cost": dict(ranking.cost)}


def _prints(stage: RankStage, job: Job) -> dict[str, str]:
    """What identifies the teacher and the data, so that rankings over others are not taken for comparable later."""
    from hybridize.pipeline.artifacts import digest_of, fingerprint_model
    from hybridize.pipeline.runner import fingerprint_data

    prints = {"teacher_print": fingerprint_model(job.teacher)}
    if stage.method in _READS_ROWS:
        data = stage.data or job.data
        made = job.artifacts[data.stage].digest if isinstance(data, TracesDataSpec) else ""
        prints["data_print"] = digest_of([fingerprint_data(data), made])
    return prints


def _judge(stage: RankStage, tokenizer: Any) -> Callable[[Any], float]:
    """Accuracy of a model on problems of the training split: the test split is for the final word only."""
    from hybridize.data.world import draw_problem
    from hybridize.evaluation import evaluate_problems

    problems = [
        draw_problem(task, stage.level, "train", index, seed=stage.seed + 1)
        for task in stage.tasks
        for index in range(stage.problems_per_task)
    ]

    def accuracy(model: Any) -> float:
        return float(evaluate_problems(model, tokenizer, problems, len(problems))["overall"]["accuracy"])

    return accuracy


def describe_cost(cost: Mapping[str, Any]) -> str:
    """The ranking's cost in words."""
    return "cost: " + ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in cost.items())


def _batches(rows: Any, size: int) -> list[Any]:
    return [rows.collate([rows[i] for i in range(at, min(at + size, len(rows)))]) for at in range(0, len(rows), size)]

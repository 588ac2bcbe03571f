"""One function per kind of stage: what it does, given a folder to fill. Each meets the others through files."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridize.files import write_whole
from hybridize.pipeline.artifacts import Artifact
from hybridize.pipeline.progress import Reporter
from hybridize.spec.data import DataSpec
from hybridize.spec.layout import LayoutSpec
from hybridize.spec.stages import TEACHER, ConvertStage, DistillStage, EvaluateStage, RankStage, StageSpec

RANKING_FILE = "ranking.json"
PLAN_FILE = "conversion.txt"
EVALUATION_FILE = "evaluation.json"
METRICS_FILE = "metrics.jsonl"


@dataclass
class Job:
    """What all stages of a run share.

    Attributes:
        teacher: path or name of the teacher.
        data: what training reads.
        reporter: where progress goes.
        artifacts: finished stages by name.
    """

    teacher: str
    data: DataSpec
    reporter: Reporter
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def model_path(self, name: str) -> str:
        """Where the model of that name is."""
        return self.teacher if name == TEACHER else str(self.artifacts[name].folder)

    def tokenizer(self) -> Any:
        """The teacher's tokenizer, which every student shares.

        Raises:
            ValueError: it does not load.
        """
        return load_tokenizer(self.teacher)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: it does not load; names the path and the remedy.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir() and path.count("/") != 1:
        raise ValueError(f"{path}: there is no such folder; check the path")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        if not Path(path).is_dir():
            raise ValueError(
                f"{path}: there is no such folder, and as the name of a hub repository its tokenizer does not load "
                f"({reason}); check the path"
            ) from None
        raise ValueError(
            f"{path}: its tokenizer does not load ({reason}); put the tokenizer's files beside config.json"
        ) from None


def check_checkpoint(path: str) -> None:
    """Find what is wrong with a checkpoint's files, quickly and before any work is done.

    Raises:
        ValueError: the folder holds no checkpoint, a family that is not in the table, or a damaged file.
    """
    from hybridize.models import find_family
    from hybridize.models.checkpoint import check_files, read_model_type

    folder = Path(path)
    if folder.is_dir():
        find_family(read_model_type(folder), f"{path}/config.json: model_type")
        check_files(folder)


def run_rank(stage: RankStage, job: Job, folder: Path) -> dict[str, Any]:
    """Rank the teacher's layers into `ranking.json`."""
    from hybridize.data.chat import check_chat_template
    from hybridize.data.packing import pack_rows
    from hybridize.importance import rank_cost, rank_layers, save_ranking
    from hybridize.models import load_teacher

    check_checkpoint(job.teacher)
    tokenizer = job.tokenizer()
    if stage.method == "mmr":
        check_chat_template(tokenizer)
    teacher = load_teacher(job.teacher, dtype=working_dtype()).to(device())
    num_rows = stage.steps * stage.rows_per_step
    batches: list[Any] = []
    heldout: list[Any] = []
    if stage.method == "mmr":
        cost = rank_cost(teacher.config.num_hidden_layers, stage)
        job.reporter.say(f"  {describe_cost(cost)}")
        rows = pack_rows(job.data, tokenizer, stage.sequence_length, num_rows + stage.heldout_rows, stage.seed)
        batches = _batches(rows.part(stage.heldout_rows, len(rows)), stage.rows_per_step)
        heldout = _batches(rows.part(0, stage.heldout_rows), stage.rows_per_step)
    with job.reporter.bar("ranking") as advance:
        ranking = rank_layers(
            teacher, teacher, batches, heldout, stage, state_dir=folder / "layers", on_progress=advance
        )
    save_ranking(ranking, folder / RANKING_FILE)
    return {"order": list(ranking.order or ()), "cost": dict(ranking.cost)}


def describe_cost(cost: Mapping[str, Any]) -> str:
    """The ranking's cost in words."""
    return "cost: " + ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in cost.items())


def run_convert(stage: ConvertStage, job: Job, folder: Path) -> dict[str, Any]:
    """Convert the teacher; the hybrid and its plan go to the folder."""
    import torch

    from hybridize.models import cache_bytes, load_teacher
    from hybridize.transfer import convert

    teacher = load_teacher(job.teacher)
    layers = chosen_layers(stage, job, teacher.config.num_hidden_layers)
    layout = LayoutSpec.replace(teacher.config.num_hidden_layers, layers, stage.mixer, f"{stage.name}.layers")
    hybrid, plan = convert(teacher, layout, stage.init, stage.seed, share=True)
    write_whole(folder / PLAN_FILE, f"{plan}\n")
    hybrid.save_pretrained(folder)
    job.tokenizer().save_pretrained(folder)
    memory = {
        name: cache_bytes(model.config, torch.bfloat16) for name, model in (("teacher", teacher), ("hybrid", hybrid))
    }
    return {
        "layers": list(layers),
        "layout": [mixer.type for mixer in plan.layout.layers],
        "memory": {name: {"kv_per_token": size.kv_per_token, "state": size.state} for name, size in memory.items()},
    }


def chosen_layers(stage: ConvertStage, job: Job, num_layers: int) -> tuple[int, ...]:
    """The layers that a convert stage replaces."""
    from hybridize.importance import load_ranking

    if stage.layers is not None:
        return stage.layers
    assert stage.ranking is not None
    assert stage.num_layers is not None
    ranking = load_ranking(job.artifacts[stage.ranking].folder / RANKING_FILE)
    return ranking.choose(stage.num_layers, f"{stage.name}.num_layers")


def run_distill(stage: DistillStage, job: Job, folder: Path) -> dict[str, Any]:
    """Distil the teacher into a hybrid, resuming from a killed call's last checkpoint."""
    from hybridize.data.chat import check_chat_template
    from hybridize.data.packing import pack_rows
    from hybridize.models import load_model, load_teacher
    from hybridize.training import distill

    source = job.model_path(stage.model)
    for path in (source, job.teacher):
        check_checkpoint(path)
    tokenizer = job.tokenizer()
    check_chat_template(tokenizer)
    teacher = load_teacher(job.teacher, dtype=working_dtype())
    student = load_model(source)
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"{source}: its vocabulary has {student.config.vocab_size} entries, but that of {job.teacher} has "
            f"{teacher.config.vocab_size}; give the teacher that the hybrid was converted from"
        )
    dtype = student.dtype
    num_rows = stage.steps * stage.tokens_per_step // stage.sequence_length
    rows = pack_rows(job.data, tokenizer, stage.sequence_length, num_rows, stage.seed)
    stats = rows.stats
    if stats["num_dropped"]:
        job.reporter.say(f"  left out: {stats['num_dropped']} documents longer than {stage.sequence_length} tokens")
    with job.reporter.bar("distilling") as advance:
        result = distill(
            student,
            teacher,
            rows,
            stage,
            folder,
            on_log=lambda record, total: advance(record["step"], total, f"{record['loss_nats']:.4f} nat/token"),
        )
    to_dtype(student, dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {name: getattr(result, name) for name in result.__dataclass_fields__} | {"data": stats}


def run_evaluate(stage: EvaluateStage, job: Job, folder: Path) -> dict[str, Any]:
    """Let a model answer unseen problems and judge its replies."""
    summary = evaluate_model(stage, job.model_path(stage.model), job.teacher, job.reporter)
    write_whole(folder / EVALUATION_FILE, json.dumps(summary, indent=1))
    return summary


def evaluate_model(stage: EvaluateStage, model_path: str, tokenizer_path: str, reporter: Reporter) -> dict[str, Any]:
    """Judge the model at a path as the stage says; the scores of `hybridize.evaluation.evaluate_problems`."""
    from hybridize.data.chat import check_chat_template
    from hybridize.data.world import draw_problem
    from hybridize.evaluation import evaluate_problems
    from hybridize.models import load_model

    check_checkpoint(model_path)
    tokenizer = load_tokenizer(tokenizer_path)
    check_chat_template(tokenizer)
    model = load_model(model_path, dtype=working_dtype()).to(device())
    problems = [
        draw_problem(task, stage.level, "test", index)
        for task in stage.tasks
        for index in range(stage.problems_per_task)
    ]
    with reporter.bar("answering") as advance:
        return evaluate_problems(model, tokenizer, problems, stage.batch_size, advance)


RUNNERS: dict[str, Callable[[Any, Job, Path], dict[str, Any]]] = {
    "rank": run_rank,
    "convert": run_convert,
    "distill": run_distill,
    "evaluate": run_evaluate,
}

SCRATCH: dict[str, tuple[str, ...]] = {"rank": ("layers",), "distill": ("checkpoints",)}
"""What a kind of stage keeps only to resume from."""

_NOT_IN_KEY = {"name", "label", "control", "save_every", "batch_size", "rows_per_batch", "gradient_checkpointing"}
"""What may change without a stage being done anew: one that ran out of memory goes on in smaller batches."""

READS_DATA = ("rank", "distill")
"""Kinds of stages whose result depends on the recipe's data."""


def spec_for_key(stage: StageSpec) -> dict[str, Any]:
    """A stage's spec without what does not change its result, but perhaps by rounding."""
    return stage.model_dump(mode="json", exclude=_NOT_IN_KEY)


def device() -> str:
    """Where models run."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def working_dtype() -> Any:
    """What models run in: bf16 on a GPU, fp32 on a CPU."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def to_dtype(model: Any, dtype: Any) -> Any:
    """Convert a model's parameters in place, but those of a mixer that must stay fp32."""
    from hybridize.models.adapter import MixerLayer

    kept = {id(p): p.data for m in model.modules() if isinstance(m, MixerLayer) for p in m.cast(dtype).parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return model


def _batches(rows: Any, size: int) -> list[Any]:
    return [rows.collate([rows[i] for i in range(at, min(at + size, len(rows)))]) for at in range(0, len(rows), size)]

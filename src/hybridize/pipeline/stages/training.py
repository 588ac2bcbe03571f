"""The stages that train a model: fit, distill, SFT, on-policy distillation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hybridize.pipeline.job import Job, check_same_vocabulary, to_dtype
from hybridize.spec.stages import DistillStage, FitStage, OnPolicyStage, SftStage, TrainStage

METRICS_FILE = "metrics.jsonl"


def run_fit(stage: FitStage, job: Job, folder: Path) -> dict[str, Any]:
    """Fit each mixer alone to the attention it replaced."""
    from hybridize.training import fit

    student, teacher, tokenizer, dtype = _load(stage, job)
    rows, _, stats = _rows(stage, job, tokenizer)
    with job.reporter.bar("fitting") as advance:
        result = fit(student, teacher, rows, stage, folder, on_log=_shown(advance, "of the mean square"))
    return _save(student, dtype, tokenizer, folder, result, stats)


def run_distill(stage: DistillStage, job: Job, folder: Path) -> dict[str, Any]:
    """Distil the teacher into a hybrid, resuming from a killed call's last checkpoint."""
    from hybridize.training import distill

    student, teacher, tokenizer, dtype = _load(stage, job)
    rows, heldout, stats = _rows(stage, job, tokenizer, stage.stop.heldout_rows if stage.stop else 0)
    with job.reporter.bar("distilling") as advance:
        result = distill(student, teacher, rows, stage, folder, heldout=heldout, on_log=_shown(advance, "nat/token"))
    return _save(student, dtype, tokenizer, folder, result, stats)


def run_sft(stage: SftStage, job: Job, folder: Path) -> dict[str, Any]:
    """Fine-tune a model on traces; the teacher itself as a control."""
    from hybridize.training import finetune

    student, _, tokenizer, dtype = _load(stage, job, with_teacher=False)
    rows, _, stats = _rows(stage, job, tokenizer)
    with job.reporter.bar("fine-tuning") as advance:
        result = finetune(student, rows, stage, folder, on_log=_shown(advance, "nat/token"))
    return _save(student, dtype, tokenizer, folder, result, stats)


def run_on_policy(stage: OnPolicyStage, job: Job, folder: Path) -> dict[str, Any]:
    """Distil on the student's own answers."""
    from hybridize.data.sources import read_prompts
    from hybridize.training import distill_on_policy

    student, teacher, tokenizer, dtype = _load(stage, job)
    prompts = read_prompts(job.data_of(stage), stage.steps * stage.prompts_per_step, stage.seed)
    with job.reporter.bar("distilling") as advance:
        result = distill_on_policy(
            student,
            teacher,
            [prompt.messages for prompt in prompts],
            tokenizer,
            stage,
            folder,
            on_log=_shown(advance, "nat/token"),
        )
    return _save(student, dtype, tokenizer, folder, result, {"num_prompts": len(prompts)})


def _load(stage: TrainStage, job: Job, *, with_teacher: bool = True) -> tuple[Any, Any, Any, Any]:
    """The model to train, the teacher (or None), the tokenizer, and the precision that the model came in.

    Raises:
        ValueError: a checkpoint is damaged, the vocabularies differ, or the tokenizer has no chat template.
    """
    from hybridize.data.chat import check_chat_template

    tokenizer = job.tokenizer()
    check_chat_template(tokenizer)
    student = job.load_model(stage.model)
    student.requires_grad_(True)
    teacher = job.load_teacher() if with_teacher else None
    if teacher is not None:
        check_same_vocabulary(student, teacher, job.model_path(stage.model), job.teacher)
    return student, teacher, tokenizer, student.dtype


def _rows(stage: TrainStage, job: Job, tokenizer: Any, num_heldout: int = 0) -> tuple[Any, Any, dict[str, int]]:
    """Rows to train on, rows held out (or None), and what there is to say about the data."""
    from hybridize.data.packing import pack_rows

    num_rows = stage.steps * stage.tokens_per_step // stage.sequence_length
    packed = pack_rows(job.data_of(stage), tokenizer, stage.sequence_length, num_rows + num_heldout, stage.seed)
    rows = packed.part(num_heldout, len(packed))
    stats = rows.stats
    if stats["num_dropped"]:
        job.reporter.say(f"  left out: {stats['num_dropped']} documents longer than {stage.sequence_length} tokens")
    return rows, packed.part(0, num_heldout) if num_heldout else None, stats


def loss_of(record: Mapping[str, Any]) -> float:
    """A step's loss: in nat per token, of a fit in shares of the target's mean square."""
    return float(record["loss_relative"] if "loss_relative" in record else record["loss_nats"])


def _shown(advance: Callable[..., None], unit: str) -> Callable[[dict[str, Any], int], None]:
    """Show a step's loss behind the bar."""
    return lambda record, total: advance(record["step"], total, f"{loss_of(record):.4f} {unit}")


def _save(student: Any, dtype: Any, tokenizer: Any, folder: Path, result: Any, stats: dict[str, Any]) -> dict[str, Any]:
    """Write a trained model in the precision of the one it came from."""
    to_dtype(student, dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {name: getattr(result, name) for name in result.__dataclass_fields__} | {"data": stats}

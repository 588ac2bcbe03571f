"""The stages that make traces and models without training: traces, convert, merge."""

from pathlib import Path
from typing import Any

from hybridize.files import write_whole
from hybridize.pipeline.job import Job, device, working_dtype
from hybridize.pipeline.stages.ranking import RANKING_FILE
from hybridize.pipeline.stages.searching import SEARCH_FILE
from hybridize.spec.stages import TEACHER, ConvertStage, MergeStage, TracesStage

PLAN_FILE = "conversion.txt"


def run_traces(stage: TracesStage, job: Job, folder: Path) -> dict[str, Any]:
    """Let a model answer prompts and keep the verified answers in `traces.parquet`."""
    from hybridize.data.chat import check_chat_template
    from hybridize.data.sources import read_prompts
    from hybridize.data.traces import make_traces

    path = job.model_path(stage.model)
    tokenizer = job.tokenizer()
    check_chat_template(tokenizer)
    prompts = read_prompts(job.data_of(stage), stage.num_prompts, stage.seed)
    model: Any = path  # vLLM loads it itself
    if stage.engine == "transformers":
        model = job.load_model(stage.model, dtype=working_dtype()).to(device())
    with job.reporter.bar("answering") as advance:
        name = Path(job.teacher).name if stage.model == TEACHER else stage.model
        stats = make_traces(model, tokenizer, stage, prompts, folder, on_progress=advance, model_name=name)
    return {"verifier": stage.verifier, **stats}


def run_convert(stage: ConvertStage, job: Job, folder: Path) -> dict[str, Any]:
    """Convert a teacher, or further layers of a hybrid; the hybrid and its plan go to the folder."""
    import torch

    from hybridize.importance import load_search
    from hybridize.models import cache_bytes, layout_of, load_teacher
    from hybridize.transfer import convert

    teacher = load_teacher(job.teacher)
    source = teacher if stage.model == TEACHER else job.load_model(stage.model)
    before = layout_of(source.config)
    layout = stage.whole_layout
    if stage.search is not None:
        layout = load_search(job.artifacts[stage.search].folder / SEARCH_FILE).layout
    elif layout is None:
        layout = before.with_replaced(chosen_layers(stage, job), stage.mixer, f"{stage.name}.layers")
    layers = tuple(layer for layer in layout.replaced if layer not in before.replaced)
    hybrid, plan = convert(source, layout, stage.init, stage.seed, share=True)
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


def chosen_layers(stage: ConvertStage, job: Job) -> tuple[int, ...]:
    """The layers that a convert stage replaces."""
    from hybridize.importance import load_ranking

    if stage.layers is not None:
        return stage.layers
    assert stage.ranking is not None
    assert stage.num_layers is not None
    ranking = load_ranking(job.artifacts[stage.ranking].folder / RANKING_FILE)
    return ranking.choose(stage.num_layers, f"{stage.name}.num_layers")


def run_merge(stage: MergeStage, job: Job, folder: Path) -> dict[str, Any]:
    """Merge models of one layout."""
    from hybridize.merging import merge

    with job.reporter.bar("merging") as advance:
        return merge(
            [job.model_path(name) for name in stage.sources],
            folder,
            method=stage.method,
            weights=stage.weights,
            base=job.model_path(stage.base) if stage.base else None,
            density=stage.density,
            into=True,
            on_progress=advance,
        )

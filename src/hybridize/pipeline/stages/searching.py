"""The stage that chooses a mixer for each layer."""

from pathlib import Path
from typing import Any

from hybridize.pipeline.job import Job
from hybridize.pipeline.layout_cost import check_serving, decode_bytes, served_seconds
from hybridize.pipeline.planning import read_teacher_config
from hybridize.pipeline.stages.ranking import RANKING_FILE
from hybridize.spec.stages import SearchStage

SEARCH_FILE = "search.json"


def run_search(stage: SearchStage, job: Job, folder: Path) -> dict[str, Any]:
    """Choose a mixer for each layer; the outcome goes to `search.json`.

    Raises:
        ValueError: the rankings do not compare, or no layout meets the target.
    """
    from hybridize.importance import load_ranking, save_search

    _check_inputs(stage, job)
    rankings = {name: load_ranking(job.artifacts[name].folder / RANKING_FILE) for name in stage.rankings}
    result = search_for(stage, rankings, read_teacher_config(job.teacher))
    save_search(result, folder / SEARCH_FILE)
    return {
        "layout": result.chosen.layout,
        "loss": result.chosen.loss,
        "speedup": result.chosen.speedup,
        "exact": result.exact,
        "verdict": result.verdict,
    }


def search_for(stage: SearchStage, rankings: dict[str, Any], config: dict[str, Any]) -> Any:
    """The outcome of a search over loaded rankings, for a teacher of that config."""
    from hybridize.importance import search_layout

    num_layers = int(config["num_hidden_layers"])
    for name, ranking in rankings.items():
        if ranking.num_layers != num_layers:
            raise ValueError(
                f"{name}: it ranks a model of {ranking.num_layers} layers, but the teacher has {num_layers}; rank this "
                "teacher"
            )
    mixers = [ranking.mixer for ranking in rankings.values()]
    if stage.gpu is None:
        where = {"context_tokens": stage.context_tokens, "concurrency": stage.concurrency}
        cost = decode_bytes(config, mixers, **where)
        unit = f"bytes a step and sequence, {stage.concurrency} sequences of {stage.context_tokens:,} tokens"
    else:
        gpu, scenario = check_serving(stage.gpu, stage.scenario, stage.name)
        cost = served_seconds(config, mixers, gpu, scenario)
        unit = f"predicted seconds a token in vLLM on one {stage.gpu}, {scenario} tokens"
    return search_layout(
        rankings,
        cost,
        cost_unit=unit,
        speedup=stage.speedup,
        num_layers=stage.num_layers,
        max_groups=stage.max_groups,
    )


def _check_inputs(stage: SearchStage, job: Job) -> None:
    """Raise a `ValueError` if rankings were made from another data or teacher than the first."""
    first, *others = stage.rankings
    made_from = {name: job.artifacts[name].manifest["inputs"] for name in stage.rankings}
    for name in others:
        for what in ("teacher", "data"):
            if made_from[name].get(what) != made_from[first].get(what):
                raise ValueError(
                    f"{stage.name}.rankings: {name} was made from another {what} than {first}, so their scores do not "
                    f"compare; give both stages the same {what}"
                )

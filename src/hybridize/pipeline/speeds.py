"""How fast a run's models generate, for its report: by its own stages, and in vLLM."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from hybridize.bench.serving_records import Speed
from hybridize.pipeline.artifacts import Artifact
from hybridize.pipeline.served import measured_speeds
from hybridize.report import Serving, Throughput
from hybridize.spec.recipe import RecipeSpec
from hybridize.spec.stages import ThroughputStage

_USUAL_UTILIZATION = 0.9
_CPU_SEQUENCES = 8
"""What `hybridize bench serve` takes on a CPU where nothing else was asked for."""


def collect_speeds(
    recipe: RecipeSpec, num_layers: int, artifacts: Mapping[str, Artifact], run: Path | None
) -> tuple[list[Throughput], tuple[str, ...]]:
    """All that was measured of a run's models.

    Args:
        recipe: expanded.
        num_layers: of the teacher.
        artifacts: finished stages by name.
        run: the folder, in which `serving.jsonl` may lie; None: it is not looked for.

    Returns:
        Measurements, and what was left out of those in vLLM, in words.
    """
    found = list(_of_stages(recipe, artifacts))
    if run is None:
        return found, ()
    manifests = {name: artifact.manifest for name, artifact in artifacts.items()}
    served, notes = measured_speeds(recipe, num_layers, run, manifests)
    for (first, *others), speed in served:
        found += [_in_vllm(first, speed, ""), *(_in_vllm(model, speed, first) for model in others)]
    return found, notes


def _of_stages(recipe: RecipeSpec, artifacts: Mapping[str, Artifact]) -> Iterator[Throughput]:
    for stage in recipe.stages:
        if isinstance(stage, ThroughputStage) and stage.name in artifacts:
            metrics = artifacts[stage.name].metrics
            yield Throughput(
                stage.model,
                metrics["tokens_per_second"],
                metrics["tokens_per_second_min"],
                metrics["tokens_per_second_max"],
                stage.batch_size,
                stage.prompt_tokens,
                stage.new_tokens,
                stage.repeats,
            )


def _in_vllm(model: str, speed: Speed, layout_of: str) -> Throughput:
    most = speed.max_sequences or (_CPU_SEQUENCES if speed.device == "cpu" else None)
    crowd = "as many sequences as the memory holds"
    options = []
    if speed.device != "cpu" and speed.utilization not in (None, _USUAL_UTILIZATION):
        options.append(f"{speed.utilization:.0%} of it for vLLM")
    if speed.state_dtype != "float32":
        options.append(f"states in {speed.state_dtype}")
    if speed.step_tokens:
        options.append(f"at most {speed.step_tokens} tokens a step")
    if speed.method == "whole":
        options.append("run in full")
    serving = Serving(
        version=speed.vllm,
        device="a CPU" if speed.device == "cpu" else speed.device,
        scenario=f"{speed.scenario} tokens".replace("->", "to"),
        crowd=f"{crowd}, at most {most}" if most else crowd,
        options=tuple(options),
    )
    return Throughput(
        model,
        speed.tokens_per_second,
        min(speed.repeats),
        max(speed.repeats),
        speed.sequences,
        speed.scenario.prompt_tokens,
        speed.scenario.new_tokens,
        len(speed.repeats),
        serving,
        layout_of,
    )

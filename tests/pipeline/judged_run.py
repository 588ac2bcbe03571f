"""A finished run of five conversions that were judged, made in no time: configs, manifests and made-up results."""

import json
from pathlib import Path

from hybridize.bench.scenarios import SHAPES
from hybridize.bench.serving import ServedModel, make_served_config
from hybridize.bench.serving_job import append_record
from hybridize.pipeline.artifacts import make_artifact
from hybridize.pipeline.runner import RECIPE_FILE
from hybridize.pipeline.serving_cost import layout_shape
from hybridize.spec.recipe import parse_recipe

CONFIG = SHAPES["pocket"]

CONVERTS = {
    "two": {"layout": "amam"},
    "again": {"layout": "amam", "seed": 1},
    "wide": {"layout": "amam", "blocks": {"m": {"type": "mamba1", "state_size": 32}}},
    "mixed": {"layout": "agam"},
    "none": {"layout": "aaaa"},
    "unjudged": {"layout": "gggg"},
}


def recipe_of(folder: Path) -> dict:
    return {
        "name": "judged",
        "teacher": str(folder / "teacher"),
        "output": str(folder / "run"),
        "data": {"source": "world", "levels": [1]},
        "stages": [
            *({"kind": "convert", "name": name, **what} for name, what in CONVERTS.items()),
            *(
                {"kind": "evaluate", "name": f"judge-{name}", "model": name, "level": 1}
                for name in ("teacher", *CONVERTS)
                if name != "unjudged"
            ),
            {"kind": "report"},
        ],
    }


def make_run(folder: Path) -> Path:
    """Write it and return its folder; the weights are as good as left on another machine."""
    (folder / "teacher").mkdir()
    (folder / "teacher" / "config.json").write_text(json.dumps(CONFIG))
    recipe = parse_recipe(recipe_of(folder))
    run = recipe.output_folder
    run.mkdir()
    (run / RECIPE_FILE).write_text(json.dumps({"num_layers": 4, "recipe": recipe.model_dump(mode="json")}))
    digests: dict[str, str] = {}
    for stage in recipe.stages:
        if stage.kind == "report":
            continue
        spec = stage.model_dump(mode="json")
        inputs = {"teacher": "print"} | {name: digests[name] for name in stage.inputs}
        made = make_artifact(
            run / stage.name,
            kind=stage.kind,
            key=stage.name,
            spec=spec,
            inputs=inputs,
            work=_convert(stage) if stage.kind == "convert" else lambda _: evaluation(),
        )
        (made.folder / "model.safetensors").unlink(missing_ok=True)
        digests[stage.name] = made.digest
    return run


def _convert(stage):
    layout = stage.whole_layout

    def work(partial: Path) -> dict:
        model = ServedModel(stage.name, str(layout), CONFIG, layout_shape(CONFIG, layout), layout)
        make_served_config(model, partial / "served")
        (partial / "served" / "config.json").rename(partial / "config.json")
        (partial / "served").rmdir()
        (partial / "model.safetensors").write_bytes(b"weights")
        memory = {name: {"kv_per_token": 512, "state": 0} for name in ("teacher", "hybrid")}
        return {"layers": [], "layout": [mixer.type for mixer in layout.layers], "memory": memory}

    return work


def evaluation() -> dict:
    score = {"correct": 5, "total": 10, "accuracy": 0.5, "low": 0.2, "high": 0.8, "steps_correct": 4}
    return {"overall": score, "tasks": {"sums": score}}


def add_record(file: Path, model: ServedModel, rate: float, **more) -> None:
    """Add what `bench serve` would have measured of a model."""
    sizes = {"weight_bytes": model.shape.weight_bytes, "state_bytes": sum(model.shape.states)}
    append_record(
        file,
        {
            "model": model.name,
            "layout": model.word,
            "prompt_tokens": 1,
            "new_tokens": 16384,
            "sequences": 30,
            "device": "NVIDIA H200",
            "state_dtype": "float32",
            "method": "sampled",
            "vllm": "0.26.0",
            "asked": {"utilization": 0.9, "max_sequences": None, "step_tokens": None, **sizes},
            "tokens_per_second": rate,
            "tokens_per_second_repeats": [0.99 * rate, rate, 1.02 * rate],
            **sizes,
        }
        | more,
    )

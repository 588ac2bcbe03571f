"""Print the tables of docs/results/study.md from the run of `recipes/study-h1.yaml`, or of a part of it.

python examples/h1_study/tables.py runs/study-h1
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

FAMILIES = {"h1": "Mamba-1, the paper's", "gdn": "gated delta net"}
COUNTS = (8, 9, 10, 11, 12, 13)
SUITES = {"": "easy", "-2": "hard", "-3": "twice as long", "-4": "four times"}
TEACHERS = {"-easy": "easy", "": "hard", "-twice": "twice as long", "-fourfold": "four times"}


def read(run: Path) -> dict[str, dict]:
    """The manifests of finished stages, by name."""
    return {file.parent.name: json.loads(file.read_text()) for file in run.glob("*/manifest.json")}


def score(stage: dict | None, teacher: dict | None = None) -> str:
    """A stage's accuracy in percent with its 95% interval, and its share of the teacher's."""
    if stage is None:
        return ""
    overall = stage["metrics"]["overall"]
    text = f"{100 * overall['accuracy']:.1f} ({100 * overall['low']:.1f} to {100 * overall['high']:.1f})"
    if teacher is not None:
        text += f", {overall['accuracy'] / teacher['metrics']['overall']['accuracy']:.1%}"
    return text


def by_task(stage: dict | None) -> str:
    """Accuracy in percent of each task."""
    if stage is None:
        return ""
    return ", ".join(f"{name} {100 * task['accuracy']:.1f}" for name, task in stage["metrics"]["tasks"].items())


def family(stages: dict[str, dict], name: str) -> Iterator[str]:
    """One family at all its points, at all lengths."""
    teachers = {suite: stages.get(f"judge-teacher{suffix}") for suffix, suite in TEACHERS.items()}
    yield f"### {FAMILIES[name]}\n"
    yield "| replaced | " + " | ".join(SUITES.values()) + " | hard, by task |"
    yield "|---" * (len(SUITES) + 2) + "|"
    row = [score(teachers[suite]) for suite in SUITES.values()]
    yield f"| none (teacher) | {' | '.join(row)} | {by_task(teachers['hard'])} |"
    for count in COUNTS:
        found = {suite: stages.get(f"{name}-{count}-judge{suffix}") for suffix, suite in SUITES.items()}
        row = [score(stage, teachers[suite]) for suite, stage in found.items()]
        yield f"| {count} of 16 | {' | '.join(row)} | {by_task(found['hard'])} |"
    yield ""


def judged(stages: dict[str, dict]) -> Iterator[str]:
    """Everything else that was judged, at the setting it was judged at."""
    teacher = stages.get("judge-teacher")
    yield "| model | hard, % of 2,000 | by task | tokens | last loss |"
    yield "|---|---|---|---|---|"
    for name, stage in stages.items():
        spec = stage["spec"]
        if stage["kind"] != "evaluate" or not name.startswith("judge-") or spec["level"] != 2 or spec["levels"]:
            continue
        trained = stages.get(spec["model"], {}).get("metrics", {})
        loss, tokens = trained.get("final_loss_nats"), trained.get("tokens")
        cells = [spec["label"], score(stage, teacher), by_task(stage)]
        cells += [f"{tokens / 1e6:.1f}M" if tokens else "", f"{loss:.4f}" if loss is not None else ""]
        yield f"| {' | '.join(cells)} |"
    yield ""


def rankings(stages: dict[str, dict]) -> Iterator[str]:
    """Which layers each ranking would replace first."""
    yield "| ranking | least important first |"
    yield "|---|---|"
    for name, stage in stages.items():
        if stage["kind"] == "rank":
            yield f"| {name} | {', '.join(map(str, stage['metrics']['order']))} |"
    yield ""


def cost(stages: dict[str, dict]) -> Iterator[str]:
    """How long the stages of each kind took, added up; side by side they take less."""
    seconds: dict[str, float] = {}
    for stage in stages.values():
        seconds[stage["kind"]] = seconds.get(stage["kind"], 0.0) + stage["seconds"]
    yield "| kind | process minutes |"
    yield "|---|---|"
    for kind, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        yield f"| {kind} | {spent / 60:.1f} |"
    yield f"| all {len(stages)} stages | {sum(seconds.values()) / 60:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    run = parser.parse_args().run
    names = list(json.loads((run / "recipe.json").read_text())["recipe"]["stages"])
    order = {stage.get("name"): number for number, stage in enumerate(names)}
    stages = dict(sorted(read(run).items(), key=lambda item: (order.get(item[0], -1), item[0])))
    if not stages:
        parser.error(f"{run}: no stage is finished there")
    for part in (*(family(stages, name) for name in FAMILIES), judged(stages), rankings(stages), cost(stages)):
        print("\n".join(part))


if __name__ == "__main__":
    main()

"""A made-up study of 46 models: series, controls and seeds; `python report_study.py DIR` draws it."""

import random
import sys
from dataclasses import replace
from pathlib import Path

from report_example import curve, score

from hybridize.report import CacheMemory, Evaluation, LossCurve, Model, Ranking, ReportData, Throughput, write_report

NUM_LAYERS = 16
COUNTS = (8, 9, 10, 11, 12, 13)
SERIES = {"h1": "", "gated delta net": "gated delta net, "}
OTHERS = ("one shot", "Mamba-2", "gated delta net", "Kimi delta attention", "best mixture", "SFT", "SFT, merged")
CONTROLS = tuple(f"control {letter}" for letter in "abcdefghijklmnop")
SEEDED = ("one shot", "gated delta net", "best mixture", "control a", "control b")


def models() -> tuple[Model, ...]:
    found = [Model("teacher", "teacher", 0)]
    for series, prefix in SERIES.items():
        found += [Model(f"{series}-{n}", f"{prefix}{n} of {NUM_LAYERS}", n, series=series) for n in COUNTS]
    for name in (*OTHERS, *CONTROLS):
        labels = [name, *(f"{name}, seed {seed}" for seed in (1, 2) if name in SEEDED)]
        found += [Model(label.replace(" ", "-"), label, 10, is_control=name in CONTROLS) for label in labels]
    return tuple(found)


def study(accuracies: str = "spread") -> ReportData:
    """The study; its accuracies are `spread`, or `tied`, so that many points fall on one another."""
    draw = random.Random(7)
    evaluations = []
    for model in models():
        share = 0.97 - 0.02 * max(0, model.num_mixers - 7) - 0.2 * draw.random() * model.is_control
        correct = 25 * draw.randrange(3) if accuracies == "tied" else round(100 * share)
        tasks = {"sums": score(correct, 100), "swaps": score(correct, 100)}
        point = "teacher" if model.is_teacher else "distilled"
        right = score(correct, 100)
        evaluations.append(Evaluation(point, model.label, right, tasks, None, model.is_control, model.name))
    return ReportData(
        title="A made-up study",
        created="2026-03-14 15:09 UTC",
        teacher="tiny-reasoner-16",
        layout=("attention",) * NUM_LAYERS,
        rankings=tuple(rankings()),
        losses=tuple(losses()),
        evaluations=tuple(evaluations),
        memory=memory(),
        models=models(),
        result="SFT,-merged",
    )


def with_throughput(data: ReportData) -> ReportData:
    """The same with speeds that grow with the number of mixers, and that are alike where it is."""
    draw = random.Random(8)
    rates = {model.name: 1000 / (18 - model.num_mixers) * (1 + 0.01 * draw.random()) for model in data.models}
    return replace(data, throughput=tuple(Throughput(n, v, v, v, 32, 16, 1024, 3) for n, v in rates.items()))


def losses() -> list[LossCurve]:
    found = [
        replace(
            curve(model.name, model.label, 2.0, 0.1, at, is_control=model.is_control, points=4), series=model.series
        )
        for at, model in enumerate(models()[1:])
    ]
    return [*found, curve("sft", "SFT", 0.6, 0.4, 99, "SFT", points=4)]


def rankings() -> list[Ranking]:
    nothing = (None,) * NUM_LAYERS
    found = []
    for series in SERIES:
        for count in COUNTS:
            replaced = tuple(range(count - 1)) if count > COUNTS[0] else ()
            chosen = tuple(range(count - len(replaced))) if not replaced else (count - 1,)
            stage = f"{series}, {count} of {NUM_LAYERS} layers"
            scores = tuple(None if layer in replaced else 0.1 + layer for layer in range(NUM_LAYERS))
            row = Ranking("mmr", scores, chosen, chosen, before=scores, stage=stage, replaced=replaced, series=series)
            control = replace(row, method="uniform", scores=nothing, before=(), is_control=True)
            found += [row, control]
    for mixer in ("mamba1", "mamba2", "gated delta net", "kimi delta attention"):
        scores = tuple(0.1 + layer for layer in range(NUM_LAYERS))
        chosen = tuple(range(10))
        found.append(
            Ranking("mmr", scores, chosen, chosen, before=scores, stage="10 of 16 layers", detail=f"{mixer}, neutral")
        )
    return found


def memory() -> tuple[CacheMemory, ...]:
    found = [CacheMemory("teacher", 8192, 0, "teacher")]
    for number, series in enumerate(SERIES):
        found += [
            CacheMemory(f"{series}, {n} of 16 replaced", 512 * (16 - n), 1000 * n * (1 + number), series=series)
            for n in COUNTS
        ]
    return (*found, CacheMemory("10 of 16 replaced", 512 * 6, 20000))


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1]), study()))

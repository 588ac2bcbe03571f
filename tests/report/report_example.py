"""Made-up data for the tests, no result of anything; `python report_example.py DIR` draws them."""

import math
import random
import sys
from pathlib import Path

from hybridize.report import (
    CacheMemory,
    Evaluation,
    HarnessScore,
    LossCurve,
    Merge,
    Model,
    Ranking,
    ReportData,
    Score,
    StageCost,
    TextScore,
    Throughput,
    TokenSpend,
    Traces,
    write_report,
)

NUM_LAYERS = 24
TASKS = ("addition", "lookup", "chains", "swaps")
STEP_TOKENS = 16384


def score(correct, total):
    """A Score with its Wilson interval at 95%."""
    share, z = correct / total, 1.959964
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Score(correct, total, share, max(0.0, centre - half), min(1.0, centre + half))


def evaluation(point, label, model, counts, steps=None, is_control=False, pass_at=None, suite="level 2"):
    tasks = {name: score(right, 100) for name, right in zip(TASKS, counts, strict=True)}
    return Evaluation(
        point, label, score(sum(counts), 400), tasks, steps, is_control, model, suite, dict(pass_at or {})
    )


def stage_ranking(stage, seed, replaced, count):
    """An MMR ranking of what is attention still, and its two controls."""
    draw = random.Random(seed)
    left = [layer for layer in range(NUM_LAYERS) if layer not in replaced]
    after = {i: round(0.002 + 0.09 * draw.random() ** 3 + 0.4 * (i < 2), 5) for i in left}
    before = {i: round(after[i] * (1.3 + 6 * draw.random()), 4) for i in left}
    order = tuple(sorted(left, key=lambda layer: after[layer]))

    def row(values):
        return tuple(values.get(layer) for layer in range(NUM_LAYERS))

    nothing = (None,) * NUM_LAYERS
    even = tuple(left[(2 * i + 1) * len(left) // (2 * count)] for i in range(count))
    shuffled = draw.sample(left, len(left))
    return order[:count], (
        Ranking(
            "MMR",
            row(after),
            order,
            tuple(sorted(order[:count])),
            before=row(before),
            steps=100,
            stage=stage,
            paper="arXiv 2511.02651",
            replaced=tuple(replaced),
        ),
        Ranking("uniform", nothing, (), even, is_control=True, stage=stage, replaced=tuple(replaced)),
        Ranking(
            "random",
            nothing,
            tuple(shuffled),
            tuple(sorted(shuffled[:count])),
            is_control=True,
            stage=stage,
            replaced=tuple(replaced),
        ),
    )


def curve(name, label, start, end, seed, kind="distillation", unit="nat/token", is_control=False, points=30):
    draw = random.Random(seed)
    losses = [
        round(end + (start - end) * math.exp(-6 * index / points) * (1 + 0.1 * draw.random()), 5)
        for index in range(points)
    ]
    steps = tuple(range(10, 10 * points + 1, 10))
    tokens = tuple(STEP_TOKENS * step for step in steps)
    return LossCurve(name, label, steps, tuple(losses), tokens, is_control, unit, kind)


def speeds(model, *medians):
    shapes = ((32, 16, 1024), (8, 1024, 256))
    return [
        Throughput(model, median, 0.96 * median, 1.03 * median, *shape, repeats=3)
        for shape, median in zip(shapes, medians, strict=False)
    ]


def harness(model, *values):
    tasks = (("gsm8k", "exact_match, flexible-extract", 250), ("math500", "exact_match", 100))
    found = [
        HarnessScore(model, task, metric, value, math.sqrt(value * (1 - value) / n), n)
        for (task, metric, n), value in zip(tasks, values, strict=False)
    ]
    return [*found, HarnessScore(model, "wikitext", "word_perplexity", 11.5 + 3 * (1 - values[0]), is_share=False)]


def example() -> ReportData:
    rankings, replaced = [], []
    for number, count in enumerate((6, 6, 4)):
        chosen, found = stage_ranking(f"{len(replaced) + count} of {NUM_LAYERS}", number, tuple(replaced), count)
        replaced += chosen
        rankings += found
    stages = [("h-6-fit", 491520), ("h-6-distill", 4915200), ("h-12-distill", 4915200), ("h-16-distill", 9830400)]
    spent = [TokenSpend(name, tokens) for name, tokens in stages]
    sft = TokenSpend("sft", 1638400)
    return ReportData(
        title="Made-up example: 24 layers, replaced in three stages",
        created="2026-03-14 15:09 UTC",
        teacher="tiny-reasoner-24",
        layout=tuple("mamba1" if layer in replaced[:12] else "attention" for layer in range(NUM_LAYERS)),
        recipe="teacher: tiny-reasoner-24\nstages:\n  - kind: schedule\n    layers: [6, 12, 16]\n",
        versions={"hybridize": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        rankings=tuple(rankings),
        losses=(
            curve("h-6-fit", "fit of 6 layers", 0.91, 0.22, 6, "fit", "of the output's variance"),
            curve("h-6-distill", "6 of 24", 1.2, 0.021, 1),
            curve("h-12-distill", "12 of 24", 1.9, 0.051, 2),
            curve("h-16-distill", "16 of 24", 2.6, 0.11, 3),
            curve("random-distill", "random init", 9.8, 2.41, 4, is_control=True),
            curve("sft", "SFT of 12 of 24", 0.61, 0.44, 5, "SFT"),
            curve("sft-teacher", "SFT of the teacher", 0.42, 0.4, 7, "SFT", is_control=True),
        ),
        evaluations=(
            evaluation("teacher", "teacher", "teacher", (93, 88, 71, 84), 320, pass_at={1: 0.835, 4: 0.91}),
            evaluation("converted", "6 of 24, untrained", "h-6-convert", (11, 3, 1, 0), 2),
            evaluation("distilled", "6 of 24", "h-6-distill", (92, 87, 66, 80), 301),
            evaluation("distilled", "12 of 24", "h-12-distill", (89, 80, 55, 75), 270),
            evaluation("distilled", "16 of 24", "h-16-distill", (80, 61, 31, 52), 201),
            evaluation("SFT", "12 of 24, SFT and merged", "merge", (91, 85, 62, 78), 290, pass_at={1: 0.79, 4: 0.885}),
            evaluation("random init: distilled", "12 of 24, random init", "random-distill", (31, 12, 4, 9), 17, True),
            evaluation("SFT", "teacher after SFT", "sft-teacher", (94, 87, 72, 84), 322, True),
        ),
        memory=(
            CacheMemory("teacher", 98304, 0, "teacher"),
            CacheMemory("6 of 24", 73728, 1671168, "h-6-distill"),
            CacheMemory("12 of 24", 49152, 3342336, "merge"),
            CacheMemory("16 of 24", 32768, 4456448, "h-16-distill"),
        ),
        costs=(
            StageCost("h-6-rank", 412.5, 1228800, None),
            StageCost("h-6-convert", 3.2),
            StageCost("h-6-distill", 5210.0, 4915200, 596049920),
            StageCost("judge", 188.4, None, None, "skipped"),
        ),
        models=(
            Model("teacher", "teacher", 0),
            Model("h-6-convert", "6 of 24, untrained", 6),
            Model("h-6-distill", "6 of 24", 6, tuple(spent[:2])),
            Model("h-12-distill", "12 of 24", 12, tuple(spent[:3])),
            Model("h-16-distill", "16 of 24", 16, tuple(spent)),
            Model("merge", "12 of 24, SFT and merged", 12, (*spent[:3], sft)),
            Model("random-distill", "12 of 24, random init", 12, (TokenSpend("random-distill", 10321920),), True),
            Model("sft-teacher", "teacher after SFT", 0, (TokenSpend("sft-teacher", 1638400),), True),
        ),
        throughput=(
            *speeds("teacher", 1240.0, 410.0),
            *speeds("h-6-distill", 1612.0, 497.0),
            *speeds("h-12-distill", 2250.0, 641.0),
            *speeds("h-16-distill", 2790.0),
            *speeds("merge", 2257.0, 644.0),
            *speeds("random-distill", 2246.0),
            *speeds("sft-teacher", 1238.0),
        ),
        harness=(
            *harness("teacher", 0.812, 0.57),
            *harness("h-12-distill", 0.74, 0.49),
            *harness("merge", 0.776, 0.53),
            *harness("random-distill", 0.06),
        ),
        texts=(
            TextScore("teacher", "wikitext-2 (test)", 100000, 2.4849, 12.0),
            TextScore("merge", "wikitext-2 (test)", 100000, 2.6027, 13.5, 0.142),
            TextScore("random-distill", "wikitext-2 (test)", 100000, 4.7875, 120.0, 2.31),
        ),
        traces=(Traces("traces", "teacher", 1000, 4, 4000, 3127, 2216448, "world"),),
        merges=(Merge("merge", "slerp", ("h-12-distill", "sft"), (0.3, 0.7)),),
        result="merge",
    )


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1]), example()))

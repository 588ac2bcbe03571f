"""Made-up data for the tests, no result of anything; `python report_example.py DIR` draws them."""

import math
import random
import sys
from pathlib import Path

from hybridize.report import (
    CacheMemory,
    Evaluation,
    LossCurve,
    Ranking,
    ReportData,
    Score,
    StageCost,
    write_report,
)

NUM_LAYERS = 24


def score(correct, total):
    """A Score with its Wilson interval at 95%."""
    share, z = correct / total, 1.959964
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Score(correct, total, share, max(0.0, centre - half), min(1.0, centre + half))


def evaluation(point, label, counts, steps=None, is_control=False):
    tasks = {name: score(right, 100) for name, right in zip(("addition", "lookup", "chains"), counts, strict=True)}
    return Evaluation(point, label, score(sum(counts), 300), tasks, steps, is_control)


def ranking(method, seed, is_control=False, gap=None):
    draw = random.Random(seed)
    scores = [round(0.004 + 0.09 * draw.random() ** 3 + 0.03 * (layer < 2), 5) for layer in range(NUM_LAYERS)]
    if gap is not None:
        scores[gap] = None
    order = sorted((layer for layer in range(NUM_LAYERS) if scores[layer] is not None), key=lambda i: scores[i])
    if is_control:
        return Ranking(method, (None,) * NUM_LAYERS, tuple(order), tuple(order[:12]), is_control=True)
    return Ranking(method, tuple(scores), tuple(order), tuple(order[:12]))


def curve(name, label, start, end, seed, is_control=False, points=30):
    draw = random.Random(seed)
    losses = [
        round(end + (start - end) * math.exp(-6 * index / points) * (1 + 0.1 * draw.random()), 5)
        for index in range(points)
    ]
    steps = tuple(range(10, 10 * points + 1, 10))
    return LossCurve(name, label, steps, tuple(losses), tuple(16384 * step for step in steps), is_control)


def example() -> ReportData:
    loo, uniform = ranking("LOO", 1, gap=23), tuple(range(1, NUM_LAYERS, 2))
    return ReportData(
        title="Qwen3-like 24 layers, half of them Mamba",
        created="2026-03-14 15:09 UTC",
        teacher="tiny-reasoner-24",
        layout=tuple("mamba1" if layer in loo.chosen else "attention" for layer in range(NUM_LAYERS)),
        recipe="teacher: tiny-reasoner-24\nstages:\n  - kind: distil\n    loss: reverse_kl\n",
        versions={"hybridize": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        rankings=(
            loo,
            ranking("MMR", 2),
            Ranking("uniform", (None,) * NUM_LAYERS, uniform, uniform, is_control=True),
            ranking("random, seed 0", 5, is_control=True),
        ),
        losses=(
            curve("distil", "distilled hybrid", 3.2, 0.081, 1),
            curve("distil-sft", "same, from uniform layout", 3.9, 0.13, 2),
            curve("distil-random", "random init", 9.8, 2.41, 3, is_control=True),
        ),
        evaluations=(
            evaluation("teacher", "teacher", (93, 88, 71), steps=240),
            evaluation("converted", "converted", (11, 3, 1), steps=2),
            evaluation("distilled", "distilled", (87, 80, 49), steps=198),
            evaluation("random init: converted", "random init", (0, 0, 0), steps=0, is_control=True),
            evaluation("random init: distilled", "random init, distilled", (31, 12, 4), steps=17, is_control=True),
        ),
        memory=(
            CacheMemory("teacher", 98304, 0),
            CacheMemory("hybrid, 12 of 24", 49152, 3342336),
            CacheMemory("hybrid, 18 of 24", 24576, 5013504),
        ),
        costs=(
            StageCost("importance", 412.5, 1228800, None),
            StageCost("convert", 3.2),
            StageCost("distil", 5210.0, 4915200, 596049920),
            StageCost("evaluate", 188.4, None, None, "skipped"),
        ),
    )


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1]), example()))

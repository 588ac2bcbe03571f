"""A small made-up run that tests take parts from."""

from hybridize.report import CacheMemory, Evaluation, LossCurve, Ranking, ReportData, Score, StageCost

TEACHER = Evaluation(
    "teacher", "teacher", Score(161, 200, 0.805, 0.744, 0.854), {"sums": Score(81, 90, 0.9, 0.821, 0.946)}
)
DISTILLED = Evaluation("distilled", "hybrid", Score(138, 200, 0.69, 0.623, 0.75), steps_correct=127)
RANDOM = Evaluation("random init: distilled", "random", Score(23, 200, 0.115, 0.078, 0.167), is_control=True)
METHOD = Ranking("MMR", (0.0713, 0.00291, None, -0.00417), order=(3, 1, 0), chosen=(3, 1))
UNIFORM = Ranking("uniform", (None,) * 4, order=(1, 3), chosen=(1, 3), is_control=True)

FULL = ReportData(
    title="A run",
    created="2026-03-14 15:09 UTC",
    teacher="tiny-teacher",
    layout=("attention", "mamba1", "attention", "mamba1"),
    recipe="stages:\n  - kind: distil\n",
    versions={"torch": "2.13.0", "hybridize": "0.1.0"},
    rankings=(METHOD, UNIFORM),
    losses=(
        LossCurve("distil", "hybrid", (7, 14, 21), (3.217, 0.4821, 0.0931), (57344, 114688, 172032)),
        LossCurve("scratch", "random", (8, 16), (9.473, 5.518), (65536, 131072), is_control=True),
    ),
    evaluations=(TEACHER, DISTILLED, RANDOM),
    memory=(CacheMemory("teacher", 12288, 0), CacheMemory("hybrid", 6144, 417792)),
    costs=(StageCost("distil", 431.6, 172032, 28311552), StageCost("evaluate", 52.4, status="skipped")),
)
EMPTY = ReportData(title="Nothing yet", created="today", teacher="t", layout=())

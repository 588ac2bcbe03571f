"""Judge a model on unseen problems of every task and level, by greedy generation.

python examples/pocket_teacher/judge.py models/pocket-teacher --per-cell 64 --out judged.json
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridize.data.world import MAX_LEVEL, TASKS, draw_problem
from hybridize.evaluation import generate_replies, summarise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--per-cell", type=int, default=64, help="problems per task and level")
    parser.add_argument("--levels", default=",".join(map(str, range(1, MAX_LEVEL + 1))))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    table = {}
    for level in map(int, args.levels.split(",")):
        started = time.perf_counter()
        problems = [draw_problem(t, level, "test", i) for t in TASKS for i in range(args.per_cell)]
        attempts = generate_replies(model, tokenizer, problems, args.batch_size)
        table[level] = summarise(attempts)
        cells = "  ".join(f"{t} {s['accuracy']:.3f}" for t, s in table[level]["tasks"].items())
        overall = table[level]["overall"]["accuracy"]
        print(f"level {level}: {overall:.3f}  {cells}  ({time.perf_counter() - started:.0f} s)", flush=True)
        for attempt in [a for a in attempts if not a.verdict.correct][:2]:
            print(f"    {attempt.problem.task}: {attempt.verdict.fault}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()

"""Compare mixers and their starts on the pocket teacher: same layers, same data, same budget, several seeds.

    python examples/mixer_study/study.py --out study --workers 8
    python examples/mixer_study/study.py --out study --workers 8 --steps 100 --tokens-per-step 1024
    python examples/mixer_study/study.py --out study --table

Every trial replaces the same layers of the pocket teacher, measures the divergence from the teacher on held-out rows
before any training, after 100 and after 1,000 steps of reverse KL (shorter runs: at each quarter), and lets the student
answer unseen problems. A trial is a pure function of its line in `VARIANTS`, its seed and its budget. Finished trials
are lines of `study/trials.jsonl`; killed and called again, the script runs those that are missing. On one H100 under
CUDA MPS 15 trials of 1,000 steps at a time take two to three minutes.
"""

import argparse
import json
import lzma
import multiprocessing
import os
import pickle
import queue
import re
import time
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "models" / "pocket-teacher"

LAYERS = {
    "half": (5, 6, 7, 8, 11, 12, 14, 15),  # the demo's: the least important half by MMR
    "most": (2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15),  # the least important three quarters
}
SEEDS = (0, 1, 2)
STEPS, FIRST_LOOK = 1000, 100
TOKENS_PER_STEP, LENGTH = 2048, 512  # by default; tokens of a row
RATE = 3e-3
HELDOUT_ROWS = 16
LEVEL, PROBLEMS_PER_TASK = 2, 75

INITS = ("aligned", "neutral", "attention_gate", "published", "random")

# name: mixer, init, layers, steps of a per-layer fit before the distillation, turn (what runs first)
VARIANTS: dict[str, tuple[dict, str, str, int, int]] = {}


def _add(turn: int, name: str, mixer: dict, init: str = "aligned", layers: str = "half", fit: int = 0) -> None:
    assert name not in VARIANTS, name
    VARIANTS[name] = (mixer, init, layers, fit, turn)


for kind in ("mamba1", "mamba2", "gated_delta_net", "kimi_delta_attention"):
    for init in INITS:
        _add(2 if init == "attention_gate" else 0, f"{kind}, {init}", {"type": kind}, init)
    _add(3, f"{kind}, neutral, gate bias", {"type": kind, "gate_bias": True}, "neutral")
    if kind != "mamba1":
        linear = {"type": kind, "conv_activation": "none"}
        _add(3, f"{kind}, no activation, neutral", linear, "neutral")
        _add(3, f"{kind}, no activation, gate bias, neutral", linear | {"gate_bias": True}, "neutral")
    for init in ("aligned", "neutral", "random"):
        _add(1, f"{kind}, {init}, most", {"type": kind}, init, "most")
    _add(3, f"{kind}, aligned, fit", {"type": kind}, "aligned", "half", 100)
    _add(3, f"{kind}, neutral, fit", {"type": kind}, "neutral", "half", 100)
_add(2, "mamba1, N 32, aligned", {"type": "mamba1", "state_size": 32})
_add(2, "mamba2, N 16, aligned", {"type": "mamba2", "state_size": 16})
_add(2, "gated_delta_net, K 16, aligned", {"type": "gated_delta_net", "head_dim": 16})
_add(2, "kimi_delta_attention, K 16, aligned", {"type": "kimi_delta_attention", "head_dim": 16})
_add(3, "mamba2, no gate norm, aligned", {"type": "mamba2", "gate_norm": False})
_add(
    3, "mamba2, no gate norm, neutral, gate bias", {"type": "mamba2", "gate_norm": False, "gate_bias": True}, "neutral"
)
_add(3, "gated_delta_net, no l2 norm, aligned", {"type": "gated_delta_net", "l2_norm": False})
_add(3, "gated_delta_net, no output norm, aligned", {"type": "gated_delta_net", "output_norm": False})
_add(3, "gated_delta_net, sigmoid gate, neutral", {"type": "gated_delta_net", "gate": "sigmoid"}, "neutral")
for window in (32, 128):
    _add(2, f"sliding_window, {window}", {"type": "sliding_window", "window": window})
    _add(2, f"sliding_window, {window}, sink", {"type": "sliding_window", "window": window, "sink": True})
    _add(2, f"sliding_window, {window}, most", {"type": "sliding_window", "window": window}, layers="most")
_add(0, "identity", {"type": "identity"})
_add(1, "identity, most", {"type": "identity"}, layers="most")


def look_every(steps: int) -> int:
    """How many steps lie between two looks at the held-out rows."""
    return FIRST_LOOK if steps > FIRST_LOOK else max(1, steps // 4)


def run_trial(name: str, seed: int, packed: Path, work: Path, steps: int, tokens_per_step: int) -> dict:
    """Run one trial; see the module's docstring."""
    import torch
    from transformers import AutoTokenizer

    from hybridize.data.world import TASKS, draw_problem
    from hybridize.evaluation.generation import evaluate_problems
    from hybridize.models import load_teacher
    from hybridize.spec import LayoutSpec, parse_mixer
    from hybridize.spec.stages import DistillStage, FitStage
    from hybridize.training import distill, fit
    from hybridize.training.divergence import heldout_divergence
    from hybridize.transfer import convert

    torch.set_num_threads(1)
    started = time.perf_counter()
    mixer, init, layers, fit_steps, _ = VARIANTS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    teacher = load_teacher(str(TEACHER)).float()
    layout = LayoutSpec.replace(teacher.config.num_hidden_layers, LAYERS[layers], parse_mixer(mixer))
    student, _ = convert(teacher, layout, init, seed)
    student, teacher = student.to(device), teacher.to(device)
    rows = pickle.loads(lzma.decompress(packed.read_bytes()))
    heldout, rows = rows.part(0, HELDOUT_ROWS), rows.part(HELDOUT_ROWS, len(rows))
    common = {
        "model": "student",
        "tokens_per_step": tokens_per_step,
        "sequence_length": LENGTH,
        "rows_per_batch": tokens_per_step // LENGTH,
        "train": "mixers",
        "save_every": 10**6,
        "seed": seed,
    }
    folder = work / f"{list(VARIANTS).index(name)}-{seed}-{steps}-{tokens_per_step}"
    trained = mixer["type"] != "identity"  # which has nothing to train
    record = {"name": name, "seed": seed, "steps": steps, "tokens_per_step": tokens_per_step}
    record["zero_shot"] = heldout_divergence(student, teacher, heldout, rows_per_batch=8)
    if trained:
        if fit_steps:
            stage = FitStage(name="fit", steps=fit_steps, learning_rate=1e-2, **common)
            fit(student, teacher, rows.part(0, fit_steps * tokens_per_step // LENGTH), stage, folder / "fit")
            record["fitted"] = heldout_divergence(student, teacher, heldout, rows_per_batch=8)
        stop = {"every": look_every(steps), "heldout_rows": HELDOUT_ROWS, "below": 1e-12}
        stage = DistillStage(name="distill", steps=steps, learning_rate=RATE, warmup_steps=20, stop=stop, **common)
        looks = {}

        def look(line: dict, total: int) -> None:
            if "heldout_nats" in line:
                looks[line["step"]] = line["heldout_nats"]

        result = distill(student, teacher, rows, stage, folder / "distill", heldout=heldout, on_log=look)
        record |= {"looks": looks, "seconds_training": result.seconds, "parameters": result.num_trainable_parameters}
    problems = [draw_problem(task, LEVEL, "test", index) for task in TASKS for index in range(PROBLEMS_PER_TASK)]
    score = evaluate_problems(student.eval(), tokenizer, problems, batch_size=300)["overall"]
    return record | {
        "correct": score["correct"],
        "problems": score["total"],
        "seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def pack(seed: int, out: Path, num_tokens: int) -> None:
    """Pack the rows of one seed, held-out ones first; keep them if they are there, whole by being renamed last."""
    if out.exists():
        return
    from transformers import AutoTokenizer

    from hybridize.data.packing import pack_rows
    from hybridize.spec.data import WorldDataSpec

    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    num_rows = HELDOUT_ROWS + num_tokens // LENGTH
    rows = pack_rows(WorldDataSpec(levels=(1, 2)), tokenizer, LENGTH, num_rows, seed)
    partial = out.with_name(f"{out.name}.{os.getpid()}.part")
    partial.write_bytes(lzma.compress(pickle.dumps(rows), preset=1))
    partial.replace(out)


def rows_file(out: Path, seed: int, budget: tuple[int, int]) -> Path:
    """Where the packed rows of a seed lie: the same ones for every budget up to the usual one."""
    return out / f"rows-{seed}-{num_tokens_of(budget)}.pickle.xz"


def num_tokens_of(budget: tuple[int, int]) -> int:
    """How many tokens are packed for a budget (steps, tokens a step)."""
    return max(budget[0] * budget[1], STEPS * TOKENS_PER_STEP)


def _worker(
    tasks: "multiprocessing.Queue", results: "multiprocessing.Queue", out: Path, budget: tuple[int, int]
) -> None:
    parent = multiprocessing.parent_process()
    while (task := tasks.get()) is not None and parent.is_alive():  # a killed one leaves its tasks behind
        name, seed = task
        try:
            results.put(run_trial(name, seed, rows_file(out, seed, budget), out / "work", *budget))
        except Exception as error:
            results.put({"name": name, "seed": seed, "error": f"{type(error).__name__}: {error}"})


def run(out: Path, workers: int, budget: tuple[int, int], seeds: tuple[int, ...], wanted: str, seconds: float) -> None:
    """Run the trials of a budget (steps, tokens a step) that are missing, turn by turn; stop after `seconds`."""
    from hybridize.pipeline.gpus import gpu_names, seeing

    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    began = time.perf_counter()
    num_tokens = num_tokens_of(budget)
    packers = [context.Process(target=pack, args=(seed, rows_file(out, seed, budget), num_tokens)) for seed in seeds]
    for packer in packers:
        packer.start()
    for packer in packers:
        packer.join()
    print(f"packed {len(seeds)} x {num_tokens:,} tokens in {time.perf_counter() - began:.0f} s", flush=True)
    done = {(trial["name"], trial["seed"]) for trial in read(out) if budget_of(trial) == budget}
    todo = [(name, seed) for seed in seeds for name in VARIANTS if re.search(wanted, name) and (name, seed) not in done]
    todo.sort(key=lambda task: VARIANTS[task[0]][-1])
    tasks, results = context.Queue(), context.Queue()
    for task in todo:
        tasks.put(task)
    for _ in range(workers):
        tasks.put(None)
    processes = [context.Process(target=_worker, args=(tasks, results, out, budget)) for _ in range(workers)]
    for process, gpu in zip(processes, cycle(gpu_names() or (None,))):
        with seeing(gpu):
            process.start()
    with (out / "trials.jsonl").open("a") as file:
        for number in range(len(todo)):
            if time.perf_counter() - began > seconds:
                break
            try:
                trial = results.get(timeout=max(1.0, seconds - (time.perf_counter() - began)))
            except queue.Empty:
                break
            if "error" not in trial:
                file.write(json.dumps(trial) + "\n")
                file.flush()
            print(f"{number + 1}/{len(todo)} {time.perf_counter() - began:.0f} s {json.dumps(trial)[:400]}", flush=True)
    tasks.cancel_join_thread()  # what is left in it is not waited for
    for process in processes:
        process.kill()


def read(out: Path) -> list[dict]:
    """The finished trials."""
    file = out / "trials.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def budget_of(trial: dict) -> tuple[int, int]:
    """Steps of a trial, and tokens of a step."""
    return trial.get("steps", STEPS), trial.get("tokens_per_step", TOKENS_PER_STEP)


def table(out: Path) -> str:
    """The trials as a Markdown table for each budget: means over seeds, with the standard deviation of several."""
    trials = read(out)
    parts = []
    for steps, tokens in sorted({budget_of(trial) for trial in trials}):
        looks = [FIRST_LOOK, steps] if steps > FIRST_LOOK else [look_every(steps), 2 * look_every(steps), steps]
        heads = "".join(f" KL, {look:,} steps |" for look in looks)
        parts.append(f"{steps:,} steps of {tokens:,} tokens\n")
        parts.append(f"| mixer, start | layers | seeds | KL at once |{heads} right answers, % |")
        parts.append("|---" * (5 + len(looks)) + "|")
        for name, (_, _, layers, _, _) in VARIANTS.items():
            mine = [trial for trial in trials if trial["name"] == name and budget_of(trial) == (steps, tokens)]
            if mine:
                at = [[trial["looks"][str(look)] for trial in mine if "looks" in trial] for look in looks]
                right = [100 * trial["correct"] / trial["problems"] for trial in mine]
                cells = [_cell([trial["zero_shot"] for trial in mine]), *map(_cell, at), _cell(right, ".1f")]
                parts.append(f"| {name} | {len(LAYERS[layers])} | {len(mine)} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _cell(values: list[float], form: str = ".4f") -> str:
    if not values:
        return "none"
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tokens-per-step", type=int, default=TOKENS_PER_STEP)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", default="", help="run trials whose name matches this regular expression")
    parser.add_argument("--seconds", type=float, default=86400, help="stop after so long")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(options.out))
        return
    every = look_every(options.steps)
    if options.steps < 2 or options.steps % every:
        multiple = f"a multiple of {every}, 2 or more"
        parser.error(f"--steps {options.steps}: the table looks every {every} steps; pass {multiple}")
    budget = options.steps, options.tokens_per_step
    run(options.out, options.workers, budget, tuple(options.seeds), options.only, options.seconds)


if __name__ == "__main__":
    main()

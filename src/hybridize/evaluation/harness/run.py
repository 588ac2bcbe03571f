"""Runs tasks of lm-evaluation-harness on a model, and says what they measured.

A run needs no network: the offline tasks read local files, and nothing is asked of a hub about a model that lies in a
folder. Only tasks of lm-evaluation-harness's own fetch their data, unless those are cached.
"""

import difflib
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import set_seed

from hybridize.evaluation.harness.files import benchmarks_folder
from hybridize.evaluation.harness.quiet import quietly
from hybridize.evaluation.harness.results import summarise_results
from hybridize.evaluation.harness.scoring import close_judges

OFFLINE_TASKS = ("hybridize_aqua", "hybridize_gsm8k", "hybridize_ifeval", "hybridize_math500", "hybridize_mmlu")
"""Tasks that read files of the benchmarks' folder."""

_FOLDER = Path(__file__).parent / "tasks"
_SEED = 1234
_BOOTSTRAPS = 1000  # for the few metrics whose standard error has no formula
_GENERATE = "generate_until"


def run_harness(
    model_path: str,
    tasks: Sequence[str],
    *,
    backend: Literal["hf", "vllm"] = "hf",
    limit: int | None = None,
    batch_size: int = 8,
    benchmarks: str | Path | None = None,
    apply_chat_template: bool = True,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Judge a model with lm-evaluation-harness.

    Args:
        model_path: of a checkpoint, hybrid or not, with its tokenizer.
        tasks: names of the offline tasks (`OFFLINE_TASKS`), or of lm-evaluation-harness's own tasks and groups.
        backend: what runs the model: transformers, or vLLM.
        limit: problems of each task, its first ones; all by default.
        batch_size: requests at a time; for vLLM, the most that run at once.
        benchmarks: folder of the offline tasks' files; by default `$HYBRIDIZE_DATA/bench`.
        apply_chat_template: whether to ask through the tokenizer's chat template, if it has one.
        max_new_tokens: of each generated answer, thinking included. By default the task's own number, but no more than
            half of what the model can read.
        on_progress: called with (answered, all) requests.

    Returns:
        - `tasks`: by name, see `results.summarise_results`; where answers are generated also `max_new_tokens`, and
          `num_unfinished`, answers that ended before their thinking did, which are wrong.
        - `chat_template`: whether one was applied (never in MMLU); `backend`, `limit`, `batch_size`; `seconds`;
          `lm_eval`, its version.
        - `warnings`: what lm-evaluation-harness warned of, such as prompts that were cut.

    Raises:
        ValueError: a task is unknown, a file of its problems is missing or malformed, or an option is out of range.
        ImportError: lm-evaluation-harness, the backend or what a task needs is not installed.
    """
    _check(tasks, limit, batch_size, max_new_tokens)
    started = time.perf_counter()
    with quietly() as warnings:
        loaded = _load_tasks(tasks, benchmarks)  # before the model, which takes longer
        from hybridize.evaluation.harness.models import load_lm

        lm = load_lm(model_path, backend, batch_size)
        measured = _evaluate(lm, loaded, limit, apply_chat_template, max_new_tokens, on_progress)
    measured |= {"backend": backend, "limit": limit, "batch_size": batch_size}
    return measured | {"seconds": time.perf_counter() - started, "warnings": warnings.texts}


def evaluate_lm(
    lm: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    benchmarks: str | Path | None = None,
    apply_chat_template: bool = True,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Judge a model that lm-evaluation-harness has loaded already.

    Args:
        lm: a `lm_eval.api.model.LM` whose request methods take `disable_tqdm`, as the `TemplateLM`s do.
        tasks: and all other arguments: see `run_harness`.
        limit: see there.
        benchmarks: see there.
        apply_chat_template: see there.
        max_new_tokens: see there.
        on_progress: see there.

    Returns:
        As `run_harness`, but for `backend`, `limit`, `batch_size` and `seconds`.
    """
    _check(tasks, limit, 1, max_new_tokens)
    with quietly() as warnings:
        measured = _evaluate(
            lm, _load_tasks(tasks, benchmarks), limit, apply_chat_template, max_new_tokens, on_progress
        )
    return measured | {"warnings": warnings.texts}


def _check(tasks: Sequence[str], limit: int | None, batch_size: int, max_new_tokens: int | None) -> None:
    if not tasks or isinstance(tasks, str):
        raise ValueError(f"tasks: {tasks!r} names none; give a list of names, e.g. [{OFFLINE_TASKS[1]!r}]")
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is too small; use 1 or more")
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("harness: lm-evaluation-harness is not installed; pip install 'hybridize[eval]'")


def _load_tasks(names: Sequence[str], benchmarks: str | Path | None) -> dict[str, Any]:
    """What `TaskManager.load` gives: `tasks`, `groups`, `group_map`."""
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(names))
    for name in names:
        if name.startswith("hybridize_") and name not in OFFLINE_TASKS:
            _refuse(name, OFFLINE_TASKS)
    metadata: dict[str, Any] = {}
    if offline := set(names) & set(OFFLINE_TASKS):
        metadata["benchmarks"] = str(benchmarks_folder(benchmarks))
    # To look for lm-evaluation-harness's own tasks is to read 14,000 files.
    manager = TaskManager(include_path=_FOLDER, include_defaults=len(offline) < len(names), metadata=metadata)
    for name in names:
        if name not in manager.task_index:
            _refuse(name, manager.all_tasks)
    loaded: dict[str, Any] = manager.load(names)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return loaded


def _refuse(name: str, known: Sequence[str]) -> None:
    near = difflib.get_close_matches(name, known, n=5) or OFFLINE_TASKS
    raise ValueError(f"tasks: {name!r} is unknown; did you mean {', '.join(near)}?")


def _evaluate(
    lm: Any,
    loaded: dict[str, Any],
    limit: int | None,
    apply_chat_template: bool,
    max_new_tokens: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    import lm_eval

    from hybridize.evaluation.harness.models import Watched

    generating = {name: task for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == _GENERATE}
    budgets = {name: _set_budget(lm, task, max_new_tokens) for name, task in generating.items()}
    has_template = bool(getattr(getattr(lm, "tokenizer", None), "chat_template", None))
    is_chat = apply_chat_template and has_template
    watched = Watched(lm, tuple(loaded["tasks"].values()), on_progress)
    set_seed(_SEED)
    try:
        results = lm_eval.evaluate(
            lm=watched,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            apply_chat_template=is_chat,
            fewshot_as_multiturn=True,
        )
    finally:
        close_judges()
    summary = summarise_results(results or {"results": {}})  # of several processes, the first has them
    for name, budget in budgets.items():
        if name in summary:
            summary[name] |= {"max_new_tokens": budget, "num_unfinished": watched.unfinished[name]}
    return {
        "tasks": summary,
        "chat_template": is_chat and not all(getattr(task, "IS_PLAIN", False) for task in loaded["tasks"].values()),
        "lm_eval": lm_eval.__version__,
    }


def _set_budget(lm: Any, task: Any, max_new_tokens: int | None) -> int:
    """Give a task its number of new tokens, and return it."""
    own = task.get_config("generation_kwargs").get("max_gen_toks") or getattr(lm, "max_gen_toks", 256)
    length = getattr(lm, "max_length", None)
    budget = max_new_tokens or (own if length is None else min(own, length // 2))
    if length is not None and budget >= length:
        raise ValueError(
            f"max_new_tokens: {budget} leave no room for a prompt in the model's {length} positions; use fewer"
        )
    task.set_config(key="generation_kwargs", value={"max_gen_toks": budget}, update=True)
    return int(budget)

"""Judging by lm-evaluation-harness: its own tasks, and five benchmarks read from local files with no network.

The offline tasks are YAML files in `tasks/`, in lm-evaluation-harness's own format; `files` reads their data, `scoring`
tells right from wrong. lm-evaluation-harness is optional: nothing here imports it before `run_harness` is called.
"""

from hybridize.evaluation.harness.run import OFFLINE_TASKS, evaluate_lm, run_harness

__all__ = ["OFFLINE_TASKS", "evaluate_lm", "run_harness"]

"""Run a recipe in children of one process that has imported everything, killing them at random points.

    python killing.py recipe.yaml OUTPUT_UNDISTURBED OUTPUT_KILLED NUM_KILLS SEED

Prints how many children were killed in which stage, as JSON. A process of its own, because a child must not inherit
the threads of a test runner.
"""

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path


def child(recipe, output: Path, largest_file: int | None = None) -> int:
    """Start a child that runs the recipe into a folder; its process number."""
    from hybridize.pipeline.progress import Reporter
    from hybridize.pipeline.runner import run_recipe

    number = os.fork()
    if number:
        return number
    code = 1
    try:
        if largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        run_recipe(recipe.model_copy(update={"output": str(output)}), Reporter(quiet=True))
        code = 0
    except BaseException as error:
        from hybridize.spec.base import StoppedError

        code = 3 if isinstance(error, StoppedError) else 1
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def wait(number: int) -> int:
    """The exit code of a child; minus the signal's number if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def stage_under_way(output: Path) -> str:
    """The stage whose hidden folder is there."""
    return next((p.name[1:].removesuffix(".partial") for p in output.glob(".*.partial")), "between stages")


def main() -> None:
    import torch
    import transformers.trainer
    import trl  # noqa: F401 - so that children need not import it

    import hybridize.evaluation
    import hybridize.importance.mmr
    import hybridize.merging
    import hybridize.report
    import hybridize.training
    import hybridize.transfer  # noqa: F401
    from hybridize.spec.recipe import load_recipe

    del transformers
    torch.set_num_threads(1)
    recipe = load_recipe(sys.argv[1])
    undisturbed, killed = Path(sys.argv[2]), Path(sys.argv[3])
    started = time.monotonic()
    if (code := wait(child(recipe, undisturbed))) != 0:
        sys.exit(f"the undisturbed run ended with {code}")
    whole = time.monotonic() - started
    rng, kills = random.Random(int(sys.argv[5])), Counter()
    while kills.total() < int(sys.argv[4]):
        number = child(recipe, killed)
        time.sleep(rng.uniform(0.02, whole / 5))
        place = stage_under_way(killed)
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        code = wait(number)
        if code == -signal.SIGKILL:
            kills[place] += 1
        elif code != 0:
            sys.exit(f"a run after {kills.total()} kills ended with {code}")
        else:  # it got through: the next children find everything standing, so begin anew
            os.rename(killed, killed.with_name(f"{killed.name}-{kills.total()}"))
    if (code := wait(child(recipe, killed))) != 0:
        sys.exit(f"the last run ended with {code}")
    # A disk that takes no large file: the run stops there, and goes on when there is room.
    short = killed.with_name(f"{killed.name}-short-of-disk")
    full = wait(child(recipe, short, largest_file=100_000))
    kept = len(list(short.glob("*/manifest.json")))
    if (code := wait(child(recipe, short))) != 0:
        sys.exit(f"the run after the full disk ended with {code}")
    print(json.dumps({"kills": dict(kills), "exit_on_full_disk": full, "kept": kept, "seconds": whole}))


if __name__ == "__main__":
    main()

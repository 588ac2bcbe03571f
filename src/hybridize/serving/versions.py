"""Which releases of vLLM the plugin was run with; outside of them it refuses to serve, and says so."""

import re

# Major and minor number of the oldest and the newest release, both included.
OLDEST, NEWEST = (0, 26), (0, 32)
# The oldest whose attention for the CPU takes sinks in any dtype; before, in bf16 only.
SINKS_ON_CPU = (0, 31)


def release_of(version: str) -> tuple[int, int] | None:
    """Major and minor number of a version such as `0.26.0+cu130`; None if it has none."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))


def version_problem(version: str) -> str | None:
    """Say why a release of vLLM cannot be used, and what to install; None if it can.

    Args:
        version: `vllm.__version__`, e.g. `0.32.0` or `0.26.0+cu130`.
    """
    release = release_of(version)
    if release is not None and OLDEST <= release <= NEWEST:
        return None
    (_, oldest), (_, newest) = OLDEST, NEWEST
    return (
        f"vllm: version {version} is installed, but hybrids are served by 0.{oldest} to 0.{newest} only; "
        f"pip install 'vllm>=0.{oldest},<0.{newest + 1}', or a newer hybridize"
    )

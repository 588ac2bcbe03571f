"""Which releases of vLLM the plugin was run with; outside of them it refuses to serve, and says so."""

import re

# Major and minor number of the oldest and the newest release, both included.
OLDEST, NEWEST = (0, 26), (0, 32)


def version_problem(version: str) -> str | None:
    """Say why a release of vLLM cannot be used, and what to install; None if it can.

    Args:
        version: `vllm.__version__`, e.g. `0.32.0` or `0.26.0+cu130`.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        return None
    (_, oldest), (_, newest) = OLDEST, NEWEST
    return (
        f"vllm: version {version} is installed, but hybrids are served by 0.{oldest} to 0.{newest} only; "
        f"pip install 'vllm>=0.{oldest},<0.{newest + 1}', or a newer hybridize"
    )

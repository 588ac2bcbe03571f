"""What the plugin does in each of vLLM's processes: it registers the hybrids' configs, models and checks."""

from typing import Any

from hybridize.models.families import FAMILIES
from hybridize.serving.versions import version_problem


def register_hybrids() -> None:
    """Register the hybrids of every family with vLLM; may be called any number of times.

    Under a release of vLLM that the plugin does not know, or for a family that vLLM does not have, what is registered
    is a model that says so, and nothing else in vLLM is touched.
    """
    import vllm
    from vllm.model_executor.models.registry import ModelRegistry

    problem = version_problem(vllm.__version__)
    for family in FAMILIES.values():
        name = family.hybrid_model_class
        if problem is not None:
            ModelRegistry.register_model(name, refused_model(name, problem))
            continue
        from hybridize.serving.natives import has_native_model, missing_family

        if has_native_model(family):
            ModelRegistry.register_model(name, f"hybridize.serving.models:{name}")
        else:
            ModelRegistry.register_model(name, refused_model(name, missing_family(family)))
        _register_checks(name)


def _register_checks(name: str) -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from hybridize.serving.checks import HybridChecks

    MODELS_CONFIG_MAP[name] = HybridChecks


def refused_model(name: str, problem: str) -> Any:
    """A model class that can be registered, and that says `problem` when it is made."""
    from torch import nn

    def refuse(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        raise ValueError(problem)

    def unreachable(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(problem)

    methods = ("forward", "embed_input_ids", "compute_logits")  # by which vLLM tells models that generate text
    body = dict.fromkeys(methods, unreachable) | {"__init__": refuse, "problem": problem}
    return type(name, (nn.Module,), body)

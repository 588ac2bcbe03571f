"""Which families vLLM has a model of its own for."""

import importlib
from typing import Any

from hybridize.models import ModelFamily


def native_model(family: ModelFamily) -> Any:
    """The model class that vLLM has of its own for a family.

    Raises:
        ValueError: the installed vLLM has none; says so and what to do instead.
    """
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    module, name = _TEXT_GENERATION_MODELS.get(family.model_class, ("transformers", ""))
    if module.startswith("transformers"):
        raise ValueError(missing_family(family))
    return getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)


def has_native_model(family: ModelFamily) -> bool:
    """Whether the installed vLLM has a model of its own for a family; imports none."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    module, _ = _TEXT_GENERATION_MODELS.get(family.model_class, ("transformers", ""))
    return not module.startswith("transformers")


def missing_family(family: ModelFamily) -> str:
    """What to tell who wants to serve a family that the installed vLLM has no model for."""
    return (
        f"vllm: the installed version has no model of its own for the family {family.model_type!r} "
        f"({family.model_class}), so its hybrids cannot be served; generate with transformers, or convert a teacher of "
        "another family"
    )

"""The hybrid model: surgery on a Hugging Face decoder, its config and cache, loading and saving.

One table of families (`families.py`) says where each decoder keeps its attention; everything else is generic.
Names are resolved at first use, because the config classes must be importable without the modelling code.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hybridize.models.families import (
    FAMILIES,
    UNSERVED,
    LogitRule,
    ModelFamily,
    Projection,
    find_family,
    geometry_of,
    logit_rule_of,
)

if TYPE_CHECKING:
    from hybridize.models.accounting import CacheBytes, cache_bytes, sequence_bytes
    from hybridize.models.adapter import MixerLayer
    from hybridize.models.apriel import export_apriel, import_apriel
    from hybridize.models.checkpoint import check_output, load_model, load_teacher, save_hybrid
    from hybridize.models.configs import hybrid_config_class
    from hybridize.models.exports import export_native
    from hybridize.models.hybrid import attention_module, hybrid_model_class
    from hybridize.models.surgery import convert_model, layout_of, resolve_layout, swap_layer

_HOMES = {
    "CacheBytes": "accounting",
    "cache_bytes": "accounting",
    "sequence_bytes": "accounting",
    "MixerLayer": "adapter",
    "export_apriel": "apriel",
    "import_apriel": "apriel",
    "check_output": "checkpoint",
    "load_model": "checkpoint",
    "load_teacher": "checkpoint",
    "save_hybrid": "checkpoint",
    "hybrid_config_class": "configs",
    "export_native": "exports",
    "attention_module": "hybrid",
    "hybrid_model_class": "hybrid",
    "convert_model": "surgery",
    "layout_of": "surgery",
    "resolve_layout": "surgery",
    "swap_layer": "surgery",
}

__all__ = [
    "FAMILIES",
    "UNSERVED",
    "CacheBytes",
    "LogitRule",
    "MixerLayer",
    "ModelFamily",
    "Projection",
    "attention_module",
    "cache_bytes",
    "check_output",
    "convert_model",
    "export_apriel",
    "export_native",
    "find_family",
    "geometry_of",
    "hybrid_config_class",
    "hybrid_model_class",
    "import_apriel",
    "layout_of",
    "load_model",
    "load_teacher",
    "logit_rule_of",
    "resolve_layout",
    "save_hybrid",
    "sequence_bytes",
    "swap_layer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

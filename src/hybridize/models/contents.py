"""Whether a folder holds the tensors that it should, each of its shape."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hybridize.models.families import find_family
from hybridize.models.hybrid import hybrid_model_class
from hybridize.models.stored import StoredTensors

Shapes = Mapping[str, tuple[int, ...]]


def hybrid_shapes(config: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Every tensor's shape in the hybrid of a config, and the names of those tied to another, which a file may lack."""
    with torch.device("meta"):
        hybrid = hybrid_model_class(find_family(config.model_type).model_type)(config)
    tied = set(getattr(hybrid, "all_tied_weights_keys", None) or {})
    return {name: tuple(tensor.shape) for name, tensor in hybrid.state_dict().items()}, tied


def check_hybrid(stored: StoredTensors, config: Any) -> None:
    """Check that stored tensors are those of the hybrid of a config.

    Raises:
        ValueError: one is missing, superfluous, or of another shape than the config says.
    """
    shapes, tied = hybrid_shapes(config)
    check_shapes(stored, {name: shape for name, shape in shapes.items() if name not in tied or name in stored.metas})


def check_shapes(stored: StoredTensors, wanted: Shapes) -> None:
    """Check that stored tensors are those wanted, each of its shape.

    Raises:
        ValueError: one is missing, superfluous, or of another shape.
    """
    found = stored.shapes
    faults = []
    if missing := sorted(wanted.keys() - found.keys()):
        faults.append(f"tensors are missing: {_some(missing)}")
    if superfluous := sorted(found.keys() - wanted.keys()):
        faults.append(f"tensors belong to no part of the model: {_some(superfluous)}")
    both = sorted(wanted.keys() & found.keys())
    if shapes := [
        f"{name} {list(found[name])}, not {list(wanted[name])}" for name in both if found[name] != wanted[name]
    ]:
        faults.append(f"tensors have another shape than the config says: {_some(shapes)}")
    if faults:
        raise ValueError(
            f"{stored.folder}: the tensors and config.json do not fit together; {'; '.join(faults)}. "
            "Fetch or convert the model again"
        )


def _some(entries: Iterable[str], limit: int = 12) -> str:
    listed = list(entries)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more

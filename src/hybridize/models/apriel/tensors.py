"""The tensors of an Apriel-H1 checkpoint and a hybrid's: a plan that accounts for each."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize.models.apriel.configs import is_fused
from hybridize.models.contents import check_shapes, hybrid_shapes
from hybridize.models.stored import StoredTensors
from hybridize.spec import IdentitySpec, Mamba1Spec

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Piece:
    """What a tensor to be written is made of.

    Attributes:
        meta: its shape and dtype.
        source: name of the stored tensor that it is; None for one filled with `value`.
        rows: first and last + 1 of the source's rows that it is; None for all.
        halved: whether it is half the source.
        value: in every entry, if there is no source.
    """

    meta: Tensor
    source: str | None
    rows: tuple[int, int] | None = None
    halved: bool = False
    value: float = 0.0

    def make(self, stored: StoredTensors) -> Tensor:
        """Make the tensor.

        Raises:
            ValueError: half of an entry is not a number of this dtype.
        """
        if self.source is None:
            return torch.full_like(self.meta, self.value, device="cpu")
        tensor = stored.copy(self.source, self.rows)
        if not self.halved:
            return tensor
        half = tensor / 2
        if not torch.equal(half * 2, tensor):
            raise ValueError(
                f"{stored.folder}: {self.source} holds numbers too small for {tensor.dtype} to halve them exactly, or "
                "NaN; set its mixer's dt_bias_mode to double and train it so"
            )
        return half


def plan_import(stored: StoredTensors, config: Any) -> dict[str, Piece]:
    """Plan the tensors of the hybrid that an Apriel-H1 checkpoint becomes.

    Args:
        stored: the checkpoint's.
        config: the hybrid's.

    Returns:
        What each is made of, by the hybrid's names.

    Raises:
        ValueError: a tensor of the checkpoint is missing, superfluous, or of another shape than the config says.
    """
    layers = config.layout.layers
    shapes, tied = hybrid_shapes(config)
    dtype = next(iter(stored.metas.values())).dtype
    plan: dict[str, Piece] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name in tied and name not in stored.metas:
            continue
        layer, rest = _layer_of(name)
        meta = torch.empty(shape, dtype=dtype, device="meta")
        if layer is not None and isinstance(layers[layer], IdentitySpec):
            plan[name] = Piece(meta, None, value=1.0 if rest.endswith("layernorm.weight") else 0.0)
            continue
        source, rows, stored_shape = _published_name(name), None, shape
        if rest.endswith("in_proj.weight") and layer is not None and is_fused(stored.metas, layer):
            prefix = name.removesuffix(rest) + "self_attn.mixer"
            upper, lower = (shapes[f"{prefix}.{part}.weight"][0] for part in ("in_proj", "dt_in_proj"))
            rows = (upper, upper + lower) if rest.endswith("dt_in_proj.weight") else (0, upper)
            source, stored_shape = _published_name(f"{prefix}.in_proj.weight"), (upper + lower, *shape[1:])
        wanted[source] = stored_shape
        plan[name] = Piece(meta.to(stored.metas[source].dtype) if source in stored.metas else meta, source, rows)
    check_shapes(stored, wanted)
    return plan


def plan_export(stored: StoredTensors, config: Any, place: str) -> dict[str, Piece]:
    """Plan the tensors of the Apriel-H1 checkpoint that a hybrid becomes.

    Args:
        stored: the hybrid's.
        config: its config, whose layers the format has (see `apriel_fields`).
        place: what to call the config in errors.

    Returns:
        What each is made of, by the checkpoint's names.

    Raises:
        ValueError: a tensor of the hybrid is missing, superfluous, or of another shape than the config says; or an
            identity layer has an MLP that does something.
    """
    layers = config.layout.layers
    shapes, tied = hybrid_shapes(config)
    wanted = {name: shape for name, shape in shapes.items() if name not in tied or name in stored.metas}
    check_shapes(stored, wanted)
    plan = {}
    for name in wanted:
        layer, rest = _layer_of(name)
        spec = None if layer is None else layers[layer]
        if isinstance(spec, IdentitySpec):
            if rest == "mlp.down_proj.weight" and bool(stored.copy(name).any()):
                raise ValueError(
                    f"{place}: mixers[{layer}]: the layer's attention is an identity but its MLP is not, while "
                    "Apriel-H1 leaves out both or none; export a hybrid without such layers"
                )
            continue
        halved = isinstance(spec, Mamba1Spec) and spec.dt_bias_mode == "single" and rest.endswith("dt_proj.bias")
        plan[_published_name(name)] = Piece(stored.metas[name], name, halved=halved)
    return plan


def _layer_of(name: str) -> tuple[int | None, str]:
    """The layer that a tensor is in, and its name there."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def _published_name(name: str) -> str:
    return name.replace(".self_attn.mixer.", ".mixer.")

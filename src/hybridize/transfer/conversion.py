"""A whole model's conversion: a plan that accounts for every tensor of both models, and its execution."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.models import (
    attention_module,
    convert_model,
    find_family,
    geometry_of,
    layout_of,
    resolve_layout,
    swap_layer,
)
from hybridize.spec import AttentionSpec, LayoutSpec, MixerSpec, SlidingWindowSpec
from hybridize.transfer.plan import TransferPlan, plan_transfer

_LAYER_SEED_STRIDE = 1_000_003  # prime: layers' seeds of different conversions do not line up


@dataclass(frozen=True)
class ConversionPlan:
    """How a model becomes a hybrid, tensor by tensor.

    Attributes:
        model_type: the teacher's.
        layout: the hybrid's, resolved.
        layers_path: where the decoder layers are, e.g. `model.layers`.
        untouched: full names of the tensors that keep name and bits.
        transfers: the plan of each newly replaced layer, by layer.
    """

    model_type: str
    layout: LayoutSpec
    layers_path: str
    untouched: tuple[str, ...]
    transfers: dict[int, TransferPlan]

    @property
    def dropped(self) -> dict[str, str]:
        """The teacher's tensors that the hybrid is without, by full name, and why."""
        return {name: why for plan in self.transfers.values() for name, why in plan.dropped.items()}

    def check(self, source_tensors: Iterable[str], target_tensors: Iterable[str]) -> None:
        """Check that every tensor is accounted for, once.

        Args:
            source_tensors: full names of all tensors of the teacher.
            target_tensors: full names of all tensors of the student.

        Raises:
            ValueError: names the tensors that the plan does not mention, or that are not there.
        """
        used = {name for plan in self.transfers.values() for name in (*plan.used, *plan.dropped)}
        made = {entry.target for plan in self.transfers.values() for entry in plan.entries}
        _check_same("teacher", used | set(self.untouched), set(source_tensors))
        _check_same("student", made | set(self.untouched), set(target_tensors))

    def __str__(self) -> str:
        """A summary line per untouched layer, a line per tensor of a replaced one."""
        replaced = len(self.transfers)
        lines = [
            f"{self.model_type}, {len(self.layout.layers)} layers, layout {self.layout}: {replaced} newly "
            f"replaced, {len(self.untouched)} tensors untouched"
            + (f", {len(self.dropped)} dropped" if self.dropped else "")
        ]
        outside = [name for name in self.untouched if not name.startswith(self.layers_path + ".")]
        lines.append(f"outside the layers: {len(outside)} tensors untouched ({', '.join(outside)})")
        for layer, spec in enumerate(self.layout.layers):
            prefix = f"{self.layers_path}.{layer}."
            count = sum(name.startswith(prefix) for name in self.untouched)
            plan = self.transfers.get(layer)
            by = f" by init '{plan.init}'" if plan and plan.init else ""
            lines.append(f"layer {layer}: {'becomes' if plan else 'stays'} {spec.type}{by}, {count} tensors untouched")
            if plan is not None:
                attention = plan.prefix.removesuffix(".mixer") + "."
                lines += [f"  {line.replace(attention, '')}" for line in str(plan).splitlines()]
        return "\n".join(lines)


def plan_conversion(config: Any, tensors: Iterable[str], layout: LayoutSpec, init: str = "aligned") -> ConversionPlan:
    """Plan a conversion from the teacher's config and its tensors' names alone.

    Args:
        config: of a teacher of any family in the table, or of a hybrid of which more layers are to be
            replaced.
        tensors: full names of all its tensors.
        layout: one mixer per layer; open sizes are filled in.
        init: see `plan_transfer`.

    Raises:
        ValueError: the layout does not fit, or a tensor of a replaced layer has nowhere to go.
    """
    names = list(tensors)
    family = find_family(config.model_type)
    layout = resolve_layout(config, layout)
    old = layout_of(config).layers
    transfers = {}
    for layer, spec in enumerate(layout.layers):
        if spec == old[layer]:
            continue
        source = family.attention_path(layer)
        transfers[layer] = plan_transfer(
            geometry_of(config),
            spec,
            init,
            source=source,
            target=f"{source}.mixer",
            projections=family.projections(geometry_of(config)),
            norms=family.norms,
            norm_offset=family.norm_offset,
            source_tensors=[name for name in names if name.startswith(f"{source}.")],
            initializer_range=getattr(config, "initializer_range", None) or 0.02,
            place=f"layout[{layer}]",
        )
    gone = tuple(f"{family.attention_path(layer)}." for layer, plan in transfers.items() if not plan.kept)
    untouched = tuple(name for name in names if not name.startswith(gone))
    return ConversionPlan(family.model_type, layout, family.layers, untouched, transfers)


def convert(
    teacher: Any, layout: LayoutSpec, init: str = "aligned", seed: int = 0, *, share: bool = False
) -> tuple[Any, ConversionPlan]:
    """Turn a teacher into a hybrid whose mixers start from the attention they replace.

    Args:
        teacher: a model of any family in the table, or a hybrid of which more layers are to be replaced.
        layout: one mixer per layer; open sizes are filled in.
        init: what mixers start from; see `plan_transfer`.
        seed: of what is drawn. A layer's draw depends on `seed` and its number only, not on what else is
            replaced.
        share: let untouched tensors share memory with the teacher's (see `convert_model`).

    Returns:
        The hybrid and the plan that it followed, which accounts for every tensor of both.

    Raises:
        ValueError: as `plan_conversion`.
    """
    sources = teacher.state_dict()
    plan = plan_conversion(teacher.config, sources, layout, init)
    with torch.random.fork_rng(devices=[]):
        hybrid = convert_model(teacher, plan.layout, share=share)
    plan.check(sources, hybrid.state_dict())
    for layer, transfer in plan.transfers.items():
        _fill(attention_module(hybrid, layer), transfer, sources, seed, layer)
    return hybrid, plan


def replace_layer(hybrid: Any, layer: int, spec: MixerSpec, init: str = "aligned", seed: int = 0) -> nn.Module:
    """Replace one attention layer of a hybrid in place by a mixer that starts from it.

    A sliding window shares the attention's parameters with the module that was there.

    Args:
        hybrid: a hybrid of any layout, e.g. `convert_model(teacher, all_attention, share=True)`.
        layer: 0-based; it must be attention.
        spec: the mixer.
        init: see `plan_transfer`.
        seed: as in `convert`: the result equals the layer of `convert` with the same seed.

    Returns:
        The attention module that was there; `swap_layer(hybrid, layer, it)` puts it back.

    Raises:
        ValueError: the layer is not attention, or as `plan_conversion`.
    """
    layers = list(layout_of(hybrid.config).layers)
    if not 0 <= layer < len(layers) or not isinstance(layers[layer], AttentionSpec):
        raise ValueError(f"layer: {layer} is not an attention layer of the layout {layout_of(hybrid.config)}; use one")
    layers[layer] = spec
    family = find_family(hybrid.config.model_type)
    prefix = family.attention_path(layer)
    sources = {f"{prefix}.{name}": tensor for name, tensor in attention_module(hybrid, layer).state_dict().items()}
    plan = plan_conversion(hybrid.config, sources, LayoutSpec(layers=tuple(layers)), init).transfers[layer]
    with torch.random.fork_rng(devices=[]):
        old = swap_layer(hybrid, layer, plan.spec)
    _fill(attention_module(hybrid, layer), plan, sources, seed, layer)
    return old


def _fill(module: nn.Module, plan: TransferPlan, sources: Mapping[str, Tensor], seed: int, layer: int) -> None:
    generator = torch.Generator().manual_seed(seed * _LAYER_SEED_STRIDE + layer)
    tensors = plan.apply(sources, generator)
    whole = not isinstance(plan.spec, SlidingWindowSpec)  # a window's other tensors are the teacher's
    made = module.get_submodule("mixer") if whole else module
    made.load_state_dict(
        {name.removeprefix(f"{plan.prefix}."): tensor for name, tensor in tensors.items()}, strict=whole
    )


def _check_same(whose: str, planned: set[str], present: set[str]) -> None:
    if planned != present:
        raise ValueError(
            f"the conversion does not account for every tensor of the {whose}; "
            f"unmentioned: {sorted(present - planned)}, mentioned but not there: {sorted(planned - present)}"
        )

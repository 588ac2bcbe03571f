"""Running a part of a decoder: from a layer's input upwards, or up to a layer.

The model's own forward runs, with its own masks and rotary embedding; only the decoder layers that are not
wanted stand still. So no modelling code is copied, and every family of the table works.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from hybridize.models import find_family


def run_layers(
    model: Any,
    batch: Mapping[str, Tensor],
    *,
    first: int = 0,
    hidden: Tensor | None = None,
    checkpoint: bool = False,
) -> Tensor:
    """Run the layers from `first` upwards and the last norm.

    Args:
        model: a teacher or a hybrid of any family in the table.
        batch: `input_ids` and `position_ids`, [rows, length].
        first: the lowest layer to run.
        hidden: its input, [rows, length, hidden]; not needed for layer 0.
        checkpoint: compute the layers above `first` again in backward instead of keeping their activations.

    Returns:
        The base model's last hidden states, after its norm, [rows, length, hidden].
    """
    instead: dict[nn.Module, Callable[..., Any]] = {}
    for position, layer in enumerate(decoder_layers(model)):
        if position < first:
            instead[layer] = lambda *_, **__: hidden
        elif checkpoint and position > first:
            instead[layer] = partial(recompute, layer.forward, use_reentrant=False, preserve_rng_state=False)
    with other_forwards(instead):
        return _run(model, batch)


def run_up_to(
    model: Any,
    batch: Mapping[str, Tensor],
    stop: int,
    *,
    first: int = 0,
    hidden: Tensor | None = None,
) -> Tensor:
    """Run the layers from `first` to below `stop`.

    Args:
        model: as in `run_layers`, and likewise `batch`, `first` and `hidden`.
        batch: `input_ids` and `position_ids`, [rows, length].
        stop: the first layer not to run.
        first: the lowest layer to run, at most `stop`.
        hidden: its input.

    Returns:
        The input of layer `stop`, [rows, length, hidden].
    """
    caught: list[Tensor] = []

    def catch(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        caught.append(hidden_states)
        return hidden_states

    instead: dict[nn.Module, Callable[..., Any]] = {}
    for position, layer in enumerate(decoder_layers(model)):
        if position >= stop:
            instead[layer] = catch
        elif position < first:
            instead[layer] = lambda *_, **__: hidden
    with other_forwards(instead):
        _run(model, batch)
    return caught[0]


def decoder_layers(model: Any) -> nn.ModuleList:
    """A model's decoder layers, from the bottom up."""
    return model.get_submodule(find_family(model.config.model_type).layers)


def _run(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    outputs = model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return outputs.last_hidden_state


@contextmanager
def other_forwards(instead: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward for a while; a module's own hooks and attributes stay as they are."""
    own = {module: vars(module)["forward"] for module in instead if "forward" in vars(module)}
    try:
        for module, forward in instead.items():
            module.forward = forward
        yield
    finally:
        for module in instead:
            del module.forward
            if module in own:
                module.forward = own[module]

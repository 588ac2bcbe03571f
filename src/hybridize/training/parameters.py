"""Which of a student's parameters are trained, and which of them decay."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch

from hybridize.models import find_family, layout_of

# Matrices by shape, but no weights of a product: a mixer's decay rates and skips, biases, norms.
_NO_DECAY = re.compile(r"(^|\.)(A_log|D|bias)$|norm")


def choose_trainable(student: Any, train: Literal["all", "mixers"], freeze: Sequence[str]) -> None:
    """Set `requires_grad` of every parameter.

    Args:
        student: a model; tied parameters are frozen if either of their names asks for it.
        train: `all`, or the `mixers`: what mixes along the sequence in the layers that are not the teacher's attention
            any more; of a sliding window, the attention that looks through it.
        freeze: parts of names of parameters to freeze in addition.

    Raises:
        ValueError: a pattern fits no name, there are no mixers, or nothing is left to train.
    """
    named = list(student.named_parameters(remove_duplicate=False))
    names = [name for name, _ in named]
    mixers = mixer_prefixes(student)
    if train == "mixers" and not any(name.startswith(mixers) for name in names):
        raise ValueError("train: 'mixers' is asked for, but the student has none; use 'all', or convert layers")
    for pattern in freeze:
        if not any(pattern in name for name in names):
            raise ValueError(
                f"freeze: {pattern!r} is part of no parameter's name; names are {', '.join(_examples(names))}"
            )
    for _, parameter in named:
        parameter.requires_grad_(True)
    for name, parameter in named:
        if (train == "mixers" and not name.startswith(mixers)) or any(pattern in name for pattern in freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in named):
        raise ValueError(f"freeze: {', '.join(map(repr, freeze))} leaves nothing to train; freeze less")


def mixer_prefixes(student: Any) -> tuple[str, ...]:
    """What the names of the parameters begin with that belong to layers which are not the teacher's attention."""
    family = find_family(student.config.model_type)
    return tuple(f"{family.attention_path(layer)}." for layer in layout_of(student.config).replaced)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay acts on a parameter: on weights of two or more dimensions only."""
    return parameter.ndim >= 2 and not _NO_DECAY.search(name)


def check_separate(student: Any, teacher: Any) -> None:
    """Raise a `ValueError` if training the student would change the teacher."""
    teachers = {parameter.data_ptr(): name for name, parameter in teacher.named_parameters()}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() in teachers:
            raise ValueError(
                f"student: {name} shares its memory with the teacher's {teachers[parameter.data_ptr()]}, "
                "which training would change; convert with share=False, or load the teacher again"
            )


def widen(student: Any) -> None:
    """Convert half-precision parameters to fp32: an update of a bf16 weight is mostly rounded away."""
    for parameter in student.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _examples(names: list[str], limit: int = 12) -> list[str]:
    """Names with the layer's number left out, each once."""
    distinct = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))
    return distinct[:limit] + (["..."] if len(distinct) > limit else [])

"""What ops must know of flash-linear-attention, whose Triton kernels some of them call on a GPU.

The package is optional (`pip install hybridize[gpu]`) and imported only when a kernel is called.

Legend: B batch, L length; S sequences, which are documents or parts of them within one row.
"""

from functools import cache
from importlib.util import find_spec
from weakref import ReferenceType, ref

import torch
from torch import Tensor

# The kernels subtract sums of the decays' logarithms over a chunk, in fp32, so that one strong decay costs the others
# their digits: 0.5% of the result at -1e4, all of it at -1e7, and NaN at -inf. A decay of e^-40 forgets as well.
STRONGEST_DECAY = -40.0


@cache
def is_installed() -> bool:
    """Whether the package and what it needs can be imported."""
    return all(find_spec(name) is not None for name in ("fla", "einops", "triton"))


@cache
def miscompiles_gradients(device: torch.device) -> bool:
    """Whether Triton makes a wrong kernel of the gradient of decays per head there, which the package refuses to run.

    So it does from 3.4.0 on, before 3.7.1, on Hopper (fla-org/flash-linear-attention issue 640).
    """
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    from triton import __version__

    version = tuple(int(part) for part in __version__.split("+")[0].split(".")[:3] if part.isdecimal())
    return (3, 4) <= version < (3, 7, 1)


Bounds = tuple[Tensor, Tensor, Tensor]

_latest: tuple[ReferenceType[Tensor], int, Bounds] | None = None


def sequence_bounds(starts_BL: Tensor) -> Bounds:
    """The sequences of a batch laid out as one row, as the kernels take them.

    A row of the batch begins a sequence, whether a document starts there or not. All layers of a model ask with the
    same tensor, and finding the bounds waits for the GPU: so the latest answer is kept. The package, which tells
    tensors apart by identity too, then keeps what it derives from it.

    Args:
        starts_BL: bool, True at the first token of each document.

    Returns:
        Where each sequence begins, with the end of all, [S + 1]; and each batch row's first and last sequence, [B].
    """
    global _latest
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or starts_BL.is_inference():
        return _find_bounds(starts_BL)
    version: int = starts_BL._version
    if _latest is not None and _latest[0]() is starts_BL and _latest[1] == version:
        return _latest[2]
    bounds = _find_bounds(starts_BL)
    _latest = ref(starts_BL), version, bounds
    return bounds


def _find_bounds(starts_BL: Tensor) -> Bounds:
    batch, length = starts_BL.shape
    begins_BL = starts_BL.clone()
    begins_BL[:, 0] = True
    begins = begins_BL.flatten().nonzero().flatten()
    sequence_BL = (begins_BL.flatten().cumsum(0) - 1).view(batch, length)
    end = begins.new_tensor([batch * length])
    return torch.cat([begins, end]), sequence_BL[:, 0].contiguous(), sequence_BL[:, -1].contiguous()

"""Hybrids that vLLM's own architectures can hold, no parameter of them at a value that could hide an error."""

import torch

from hybridize.models import FAMILIES, convert_model, save_hybrid
from hybridize.spec import AttentionSpec, GatedDeltaNetSpec, LayoutSpec, Mamba2Spec
from tiny_families import SIZES

MAMBA2 = Mamba2Spec(state_size=8)
GATED_DELTA = GatedDeltaNetSpec(qk_norm="none")
LAYERS = {"a": AttentionSpec(), "2": MAMBA2, "g": GATED_DELTA}


def save_case(folder, family, word, dtype=torch.float32, blocks=None, scale=0.1, **changes):
    """Write a random hybrid.

    Args:
        folder: to write.
        family: model type of its teacher.
        word: its layout, a letter a layer.
        dtype: of its weights.
        blocks: mixers by letter, beside or instead of `LAYERS`.
        scale: standard deviation of what is added to every parameter.
        **changes: to the teacher's config.
    """
    torch.manual_seed(0)
    row = FAMILIES[family]
    sizes = SIZES | {"num_hidden_layers": len(word), "eos_token_id": None} | changes
    teacher = row.teacher_model()(row.teacher_config()(**sizes)).eval()
    layers = LAYERS | (blocks or {})
    hybrid = convert_model(teacher, LayoutSpec(layers=tuple(layers[letter] for letter in word)))
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
            if name.endswith("norm.weight"):  # near nothing, below nothing, and large
                parameter.mul_(torch.exp2(torch.randn_like(parameter)))
                parameter[3].neg_()
    save_hybrid(hybrid.to(dtype), None, folder)
    return folder

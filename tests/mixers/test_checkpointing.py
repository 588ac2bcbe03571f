"""Every mixer's gradients survive gradient checkpointing, as training turns it on."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hybridize.mixers import MIXERS, build_mixer
from hybridize.spec import AttentionGeometry

GEOMETRY = AttentionGeometry(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [kind for kind in MIXERS if kind.model_fields["type"].default != "identity"])
def test_checkpointed_gradients_are_the_plain_ones(kind, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    mixer = build_mixer(kind().resolve(GEOMETRY), 24, initializer_range=0.2).to(device)
    hidden = torch.randn(2, 70, 24, device=device, requires_grad=True)
    starts = torch.zeros(2, 70, dtype=torch.bool, device=device)
    starts[0, 33] = True
    parameters = [hidden, *mixer.parameters()]

    def mix(hidden):
        return mixer(hidden, starts_BL=starts)[0]

    plain = torch.autograd.grad(mix(hidden).square().sum(), parameters)
    kept = torch.autograd.grad(checkpoint(mix, hidden, use_reentrant=False).square().sum(), parameters)
    for one, two in zip(plain, kept, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two)

"""RMS norms of blocks of channels."""

import pytest
import torch

from hybridize.mixers.norms import BlockRMSNorm


@pytest.mark.parametrize(("width", "num_weights"), [(4, 4), (4, 12), (12, 12)])
def test_each_block_is_normalised_by_itself(width: int, num_weights: int) -> None:
    norm = BlockRMSNorm(width, num_weights, 0.1).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    expected = x.clone()
    for first in range(0, 12, width):
        part = x[..., first : first + width]
        weight = norm.weight[first : first + width] if num_weights == 12 else norm.weight
        expected[..., first : first + width] = torch.nn.functional.rms_norm(part, (width,), weight, 0.1).detach()
    torch.testing.assert_close(norm(x).detach(), expected)


def test_it_is_computed_in_fp32_and_given_in_the_inputs_dtype() -> None:
    norm = BlockRMSNorm(256, 256, 1e-6).half()
    x = torch.full((1, 256), 1000.0, dtype=torch.float16)  # its square does not fit fp16
    assert norm(x).dtype == torch.float16
    torch.testing.assert_close(norm(x), torch.ones_like(x))


def test_reset_sets_the_weight_to_one() -> None:
    norm = BlockRMSNorm(2, 6, 1e-6)
    torch.nn.init.normal_(norm.weight)
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(6))

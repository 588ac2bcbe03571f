"""States in pages of bytes: they lie apart, are written through, and keep to their page."""

import pytest
import torch

from hybridize.serving.pages import StatePage, with_oldest

PAGE = StatePage((3, 5, 7), torch.float32, (11, 3), torch.bfloat16)


def pool(num_pages, stride):
    return torch.as_strided(
        torch.zeros(num_pages * stride, dtype=torch.uint8), (num_pages, PAGE.num_bytes), (stride, 1)
    )


@pytest.mark.parametrize("extra", [0, 64, 4096])
def test_states_are_written_through_and_keep_to_their_page(extra):
    pages = pool(4, PAGE.num_bytes + extra)
    conv, ssm = PAGE.views(pages)
    assert conv.shape == (4, 11, 3)
    assert ssm.shape == (4, 3, 5, 7)
    torch.manual_seed(0)
    wanted_conv, wanted_ssm = torch.randn(2, 11, 3).bfloat16(), torch.randn(2, 3, 5, 7)
    index = torch.tensor([1, 3])
    conv[index] = wanted_conv
    ssm[index] = wanted_ssm
    again_conv, again_ssm = PAGE.views(pages)
    assert torch.equal(again_conv[index], wanted_conv)
    assert torch.equal(again_ssm[index], wanted_ssm)
    assert not pages[[0, 2]].any()


def test_states_do_not_overlap():
    pages = pool(1, PAGE.num_bytes)
    conv, ssm = PAGE.views(pages)
    conv.fill_(1.0)
    ssm.fill_(2.0)
    assert conv.eq(1.0).all()
    assert pages.count_nonzero() <= 3 * 5 * 7 * 4 + 11 * 3 * 2 <= PAGE.num_bytes


def test_a_page_holds_all_but_the_oldest_input():
    page = StatePage.of({"conv": (1, 6, 4), "ssm": (1, 6, 2)}, torch.float32, torch.float32)
    assert (page.conv_shape, page.ssm_shape) == ((6, 3), (6, 2))
    assert page.num_bytes >= 6 * 3 * 4 + 6 * 2 * 4
    window = with_oldest(torch.ones(2, 6, 3))
    assert window.shape == (2, 6, 4)
    assert window.sum(dim=-1).eq(3.0).all()
    assert window[..., 0].eq(0.0).all()

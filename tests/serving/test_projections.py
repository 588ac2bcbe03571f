"""A mixer's decode step writes its output where it is told to, and gives the same numbers as without."""

import pytest
import torch

from hybridize.mixers import build_mixer
from hybridize.serving.projections import take_output_projection
from hybridize.spec import LayoutSpec
from hybridize.spec.mixers import AttentionGeometry

HIDDEN, SEQUENCES = 64, 5
GEOMETRY = AttentionGeometry(hidden_size=HIDDEN, num_heads=4, num_kv_heads=2, head_dim=16)


def make_mixer(letter, bias):
    torch.manual_seed(0)
    spec = LayoutSpec.read(f"a{letter}").resolve(GEOMETRY).layers[1].model_copy(update={"output_bias": bias})
    mixer = build_mixer(spec, HIDDEN).requires_grad_(False)
    for name, parameter in mixer.named_parameters():
        if name.endswith("proj.bias"):
            parameter.normal_()
    return mixer


def step(mixer):
    shapes = mixer.state_shapes(SEQUENCES)
    generator = torch.Generator().manual_seed(1)
    hidden, conv, ssm = (
        torch.randn(shape, generator=generator) for shape in ((SEQUENCES, HIDDEN), shapes["conv"], shapes["ssm"])
    )
    return mixer.step_in_place(hidden, conv, ssm)


@pytest.mark.parametrize("letter", list("m2gk"))
@pytest.mark.parametrize("bias", [False, True])
def test_a_step_is_written_to_its_place_and_not_beyond(letter, bias):
    mixer = make_mixer(letter, bias)
    expected = step(mixer)
    names = dict(mixer.named_parameters())
    projection = take_output_projection(mixer)
    assert {name: id(p) for name, p in mixer.named_parameters()} == {name: id(p) for name, p in names.items()}
    output = torch.full((SEQUENCES + 2, HIDDEN), torch.nan)
    with projection.writing_to(output[:SEQUENCES]):
        got = step(mixer)
    assert got.data_ptr() == output.data_ptr(), "the output is copied"
    torch.testing.assert_close(output[:SEQUENCES], expected, rtol=1e-5, atol=1e-6)
    assert output[SEQUENCES:].isnan().all()


def test_without_a_place_it_is_a_linear_layer_even_after_an_error():
    mixer = make_mixer("m", bias=True)
    expected = step(mixer)
    projection = take_output_projection(mixer)
    place = torch.zeros(SEQUENCES, HIDDEN)
    with pytest.raises(RuntimeError, match="stop"), projection.writing_to(place):
        raise RuntimeError("stop")
    torch.testing.assert_close(step(mixer), expected, rtol=1e-5, atol=1e-6)
    assert (place == 0.0).all()


def test_a_module_without_such_a_projection_is_refused():
    with pytest.raises(ValueError, match=r"Identity.*out_proj or o_proj"):
        take_output_projection(torch.nn.Identity())

import pytest
from pydantic import ValidationError

from hybridize.spec import AttentionGeometry, AttentionSpec, IdentitySpec, LayoutSpec, Mamba1Spec, Mamba2Spec

MIXER = Mamba1Spec(state_size=8)
GEOMETRY = AttentionGeometry(hidden_size=40, num_heads=4, num_kv_heads=2, head_dim=16)


def test_named_layers_become_the_mixer_and_the_rest_stays():
    layout = LayoutSpec.replace(6, [4, 1], MIXER)
    assert layout.replaced == (1, 4)
    assert layout.layers[1] == MIXER
    assert layout.layers[0] == AttentionSpec()
    assert str(layout) == "amaama"
    assert LayoutSpec.replace(3, [], MIXER).replaced == ()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 6], r"recipe\.layers\[1\]: the teacher has no layer 6; it has 6, use 0\.\.5"),
        ([-1], r"recipe\.layers\[0\]: the teacher has no layer -1; it has 6, use 0\.\.5"),
        ([2, 3, 2], r"recipe\.layers\[2\]: layer 2 is named twice; name each layer once"),
    ],
)
def test_a_layer_that_is_not_there_or_there_twice_is_named(layers, message):
    with pytest.raises(ValueError, match=message):
        LayoutSpec.replace(6, layers, MIXER, "recipe.layers")


def test_resolving_fills_in_every_mixer():
    layout = LayoutSpec.replace(3, [1], MIXER).resolve(GEOMETRY)
    assert layout.layers[1] == Mamba1Spec(state_size=8, d_inner=64, d_xb=32, dt_rank=3).resolve(GEOMETRY)
    assert layout.layers[0] == AttentionSpec()
    assert layout.resolve(GEOMETRY) == layout


def test_a_layout_survives_plain_data_and_is_frozen():
    layout = LayoutSpec.replace(3, [1], MIXER)
    assert LayoutSpec.model_validate(layout.model_dump(mode="json")) == layout
    with pytest.raises(ValidationError):
        layout.layers = ()
    with pytest.raises(ValidationError):
        LayoutSpec(layers=())


def test_a_layout_is_read_from_letters_and_written_as_them():
    layout = LayoutSpec.read("aam2gksi")
    assert [mixer.type for mixer in layout.layers] == [
        "attention",
        "attention",
        "mamba1",
        "mamba2",
        "gated_delta_net",
        "kimi_delta_attention",
        "sliding_window",
        "identity",
    ]
    assert str(layout) == "aam2gksi"


def test_blocks_say_what_letters_stand_for():
    layout = LayoutSpec.read("axmx", {"x": Mamba2Spec(state_size=8)})
    assert layout.layers == (AttentionSpec(), Mamba2Spec(state_size=8), Mamba1Spec(), Mamba2Spec(state_size=8))


@pytest.mark.parametrize(
    ("word", "blocks", "message"),
    [
        ("amz", {}, r"layout\[2\]: 'z' stands for nothing; use a \(attention\), m \(mamba1\), .*, or add a block"),
        ("am", {"x": IdentitySpec()}, "blocks: the layout 'am' has no 'x'; use the block or remove it"),
        ("am", {"xy": IdentitySpec()}, "blocks: 'xy' is not one letter"),
    ],
)
def test_a_layout_that_does_not_read_is_named(word, blocks, message):
    with pytest.raises(ValueError, match=message):
        LayoutSpec.read(word, blocks)

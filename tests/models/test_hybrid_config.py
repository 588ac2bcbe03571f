"""A hybrid's config holds resolved mixers, names the faulty one, and yields the right cache."""

import json
import logging
import pickle

import pytest
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from hybridize.models import geometry_of, hybrid_config_class
from hybridize.spec import LayoutSpec, Mamba1Spec

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
}


def mixers(config_class, replaced, **sizes):
    layout = LayoutSpec.replace(3, replaced, Mamba1Spec(state_size=4, **sizes))
    return [mixer.model_dump() for mixer in layout.resolve(geometry_of(config_class(**SIZES))).layers]


@pytest.fixture
def config_class(family):
    return hybrid_config_class(family)


def test_config_survives_json_and_pickle(config_class, tmp_path):
    config = config_class(**SIZES, mixers=mixers(config_class, [0, 2]))
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert [mixer["type"] for mixer in stored["mixers"]] == ["mamba1", "attention", "mamba1"]
    for copy in (config_class.from_pretrained(tmp_path), pickle.loads(pickle.dumps(config))):
        assert copy.layout == config.layout
        assert copy.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_config_without_mixers_is_all_attention(config_class):
    config = config_class(**SIZES)
    assert config.layout.replaced == ()
    assert not config.has_mixers


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"type": "mamba7"}, r"config\.mixers\[1\]\.type: 'mamba7' is unknown"),
        ({"type": "mamba1", "state_sise": 4}, r"config\.mixers\[1\]\.state_sise: unknown key; did you mean"),
        ({"type": "mamba1", "state_size": -4}, r"config\.mixers\[1\]\.state_size: -4 is not accepted"),
        ({"type": "mamba1"}, r"config\.mixers\[1\]\.d_inner: it is left open .*resolve the layout"),
        ({}, r"config\.mixers\[1\]: its kind is missing"),
    ],
)
def test_faulty_mixer_error_names_its_place(config_class, fault, message):
    broken = mixers(config_class, [0])
    broken[1] = fault
    with pytest.raises(ValueError, match=message):
        config_class(**SIZES, mixers=broken)


def test_wrong_number_of_mixers_is_an_error(config_class):
    with pytest.raises(ValueError, match=r"config\.mixers: it has 2 entries, but the model has 3 layers"):
        config_class(**SIZES, mixers=mixers(config_class, [0])[:2])


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("replaced", [[], [0], [1, 2], [0, 1, 2]])
def test_cache_has_the_layer_that_each_mixer_needs(replaced, window):
    config_class = hybrid_config_class("mistral")
    config = config_class(**SIZES, sliding_window=window, mixers=mixers(config_class, replaced))
    cache = DynamicCache(config=config)
    attention = DynamicLayer if window is None else DynamicSlidingWindowLayer
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, LinearAttentionLayer if index in replaced else attention)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("replaced", [[], [0], [1], [0, 1], [0, 2], [1, 3], [0, 1, 2], [0, 1, 2, 3]])
def test_where_some_layers_slide_the_first_other_one_can_count_tokens(replaced):
    """Releases up to 5.22 ask the first layer of the cache that does not slide, a mixer or not."""
    config_class = hybrid_config_class("gemma2")
    sizes = SIZES | {"num_hidden_layers": 4, "sliding_window": 6}
    layout = LayoutSpec.replace(4, replaced, Mamba1Spec(state_size=4)).resolve(geometry_of(config_class(**sizes)))
    config = config_class(**sizes, mixers=[mixer.model_dump() for mixer in layout.layers])
    cache = DynamicCache(config=config)
    asked = cache.is_sliding.index(False)
    assert isinstance(cache.layers[asked], DynamicLayer)
    assert not isinstance(cache.layers[asked], DynamicSlidingWindowLayer)
    assert config.layer_types.count("hybrid") == (asked in replaced)


def test_attention_types_of_another_length_are_an_error():
    config_class = hybrid_config_class("gemma2")
    with pytest.raises(ValueError, match=r"config\.attention_types: it has 2 entries, but the model has 3 layers"):
        config_class(**SIZES, attention_types=["full_attention"] * 2)


def test_config_of_before_attention_types_loads(tmp_path):
    config_class = hybrid_config_class("mistral")
    config_class(**SIZES, sliding_window=6, mixers=mixers(config_class, [0])).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    del stored["attention_types"]
    file.write_text(json.dumps(stored))
    assert config_class.from_pretrained(tmp_path).attention_types == ["sliding_attention"] * 3


def test_config_of_before_biases_and_norms_loads(tmp_path):
    config_class = hybrid_config_class("llama")
    stored = mixers(config_class, [0])
    for name in ("gate_bias", "qkv_bias", "output_bias", "qk_norm", "norm_eps"):
        del stored[0][name]
    spec = config_class(**SIZES, mixers=stored).layout.layers[0]
    assert (spec.gate_bias, spec.qkv_bias, spec.output_bias, spec.qk_norm) == (False, False, False, "none")


def test_mistral_does_not_warn_about_layer_types(tmp_path, caplog):
    config_class = hybrid_config_class("mistral")
    config_class(**SIZES, mixers=mixers(config_class, [0])).save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        loaded = config_class.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert loaded.layer_types[0] == "linear_attention"
    assert "layer_types" not in caplog.text

"""The table of families answers for teachers and hybrids, and says where to add a row."""

import pytest
from transformers import LlamaConfig, MistralConfig

from hybridize.models import FAMILIES, find_family, geometry_of


@pytest.mark.parametrize("model_type", ["llama", "hybrid_llama"])
def test_family_is_found_for_teacher_and_hybrid(model_type):
    assert find_family(model_type) is FAMILIES["llama"]


@pytest.mark.parametrize("model_type", ["bert", "hybrid_bert", "", None])
def test_unknown_family_error_names_value_rows_and_file(model_type):
    with pytest.raises(ValueError, match=r"llama, mistral.*hybridize/models/families\.py") as caught:
        find_family(model_type, "somewhere/config.json: model_type")
    assert repr(model_type) in str(caught.value)
    assert "somewhere/config.json: model_type" in str(caught.value)


def test_geometry_reads_sizes_and_defaults():
    given = geometry_of(MistralConfig(hidden_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=16))
    assert (given.hidden_size, given.num_heads, given.num_kv_heads, given.head_dim) == (40, 4, 2, 16)
    derived = geometry_of(LlamaConfig(hidden_size=32, num_attention_heads=4))
    assert (derived.num_kv_heads, derived.head_dim) == (4, 8)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_row_names_real_classes(model_type):
    row = FAMILIES[model_type]
    assert row.teacher_config().model_type == model_type
    assert row.teacher_model().config_class is row.teacher_config()

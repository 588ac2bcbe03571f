"""The table of families answers for teachers and hybrids, and says where to add a row."""

import pytest
from transformers import LlamaConfig, MistralConfig

from hybridize import _register
from hybridize.models import FAMILIES, UNSERVED, LogitRule, ModelFamily, find_family, geometry_of
from hybridize.models.families import NotInTransformersError


@pytest.mark.parametrize("model_type", ["llama", "hybrid_llama"])
def test_family_is_found_for_teacher_and_hybrid(model_type):
    assert find_family(model_type) is FAMILIES["llama"]


@pytest.mark.parametrize("model_type", ["bert", "hybrid_bert", "", None])
def test_unknown_family_error_names_value_rows_and_file(model_type):
    with pytest.raises(ValueError, match=r"llama, mistral.*hybridize/models/families\.py") as caught:
        find_family(model_type, "somewhere/config.json: model_type")
    assert repr(model_type) in str(caught.value)
    assert "somewhere/config.json: model_type" in str(caught.value)


@pytest.mark.parametrize("model_type", UNSERVED)
def test_family_that_cannot_be_served_says_why(model_type):
    assert model_type not in FAMILIES
    with pytest.raises(ValueError, match=r"cannot be converted: .*; use a model of one of llama, mistral") as caught:
        find_family(model_type)
    assert UNSERVED[model_type] in str(caught.value)


class Registry:
    """Stands for transformers' module of the Auto classes."""

    def __init__(self):
        self.AutoConfig, self.seen = self, []

    def register(self, model_type, config_class, exist_ok):
        assert config_class.model_type == model_type
        self.seen.append(model_type)


@pytest.mark.parametrize("package", ["llama9", "llama"])
def test_family_of_a_later_transformers_is_left_out(package, monkeypatch):
    row = ModelFamily("llama9", "Llama9Config", "Llama9ForCausalLM", package=package)
    with pytest.raises(NotInTransformersError, match="needs Llama9Config, which the installed transformers does not"):
        row.teacher_config()
    expected = [each.hybrid_type for each in FAMILIES.values()]
    monkeypatch.setitem(FAMILIES, "llama9", row)
    registry = Registry()
    _register._register_configs(registry)
    assert registry.seen == expected


def test_a_package_that_is_missing_for_another_reason_is_not_hidden(monkeypatch):
    def broken(path):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        FAMILIES["llama"].teacher_config()


def test_fused_rows_lie_by_kind_or_by_head():
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    query, key, value, output = FAMILIES["phi3"].projections(geometry_of(config))
    assert (query.rows, key.rows, value.rows) == (tuple(range(8)), tuple(range(8, 12)), tuple(range(12, 16)))
    assert (value.name, output.name, output.rows) == ("qkv_proj", "o_proj", None)
    config = LlamaConfig(hidden_size=4, num_attention_heads=2, num_key_value_heads=2, head_dim=2)
    query, key, value, output = FAMILIES["gpt_neox"].projections(geometry_of(config))
    assert (query.rows, key.rows, value.rows) == ((0, 1, 6, 7), (2, 3, 8, 9), (4, 5, 10, 11))
    assert (key.what, output.name) == ("keys", "dense")


def test_logit_rule_reads_scale_divisor_and_softcap():
    assert FAMILIES["llama"].logit_rule(LlamaConfig()) == LogitRule()
    assert FAMILIES["granite"].logit_rule(FAMILIES["granite"].teacher_config()(logits_scaling=8)) == LogitRule(1 / 8)
    assert FAMILIES["cohere2"].logit_rule(FAMILIES["cohere2"].teacher_config()()) == LogitRule(0.0625)
    assert FAMILIES["gemma2"].logit_rule(FAMILIES["gemma2"].teacher_config()()) == LogitRule(1.0, 30.0)


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

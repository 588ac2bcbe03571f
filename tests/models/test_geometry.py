import pytest

from hybridize.models import FAMILIES, attention_module, geometry_of
from tiny_families import build_teacher


@pytest.mark.parametrize("model_type", FAMILIES)
def test_geometry_knows_the_biases_and_norms_that_the_attention_has(model_type):
    teacher = build_teacher(model_type)
    geometry, family = geometry_of(teacher.config), FAMILIES[model_type]
    attention = attention_module(teacher, 0)
    query, key, value, output = (attention.get_submodule(part.name) for part in family.projections(geometry))
    assert [module.bias is not None for module in (query, key, value)] == [geometry.qkv_bias] * 3
    assert (output.bias is not None) == geometry.output_bias
    norms = {name for name, _ in attention.named_children() if "norm" in name}
    assert norms == set(family.norms)
    assert (geometry.qk_norm != "none") == bool(norms)
    for name, heads in zip(family.norms, (geometry.num_heads, geometry.num_kv_heads), strict=False):
        norm = attention.get_submodule(name)
        span = geometry.head_dim * (heads if geometry.qk_norm == "width" else 1)
        assert norm.weight.shape == (span,)
        assert geometry.norm_eps == getattr(norm, "variance_epsilon", None) or geometry.norm_eps == norm.eps
        before = norm.weight.data.clone()
        norm.weight.data.fill_(-family.norm_offset)
        assert not norm(before).any(), "the norm multiplies by offset + weight"
        norm.weight.data.copy_(before)

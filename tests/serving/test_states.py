"""What is told to vLLM of states: their dtypes, fp32 unless asked otherwise, and one page size for all mixers."""

from types import SimpleNamespace

import pytest
import torch

from hybridize.serving.states import has_state, state_dtypes, state_page_bytes
from hybridize.serving.versions import version_problem
from hybridize.spec import LayoutSpec
from hybridize.spec.mixers import AttentionGeometry

GEOMETRY = AttentionGeometry(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)


def configured(word="aa", ssm="auto", conv="auto", dtype=torch.bfloat16, num_ranks=1):
    layout = LayoutSpec.read(word).resolve(GEOMETRY)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(layout=layout, hidden_size=64), dtype=dtype),
        cache_config=SimpleNamespace(mamba_ssm_cache_dtype=ssm, mamba_cache_dtype=conv),
        parallel_config=SimpleNamespace(tensor_parallel_size=num_ranks),
    )


def test_the_recurrences_state_is_fp32_unless_asked_otherwise():
    assert state_dtypes(configured()) == (torch.float32, torch.bfloat16)
    assert state_dtypes(configured(ssm="bfloat16", conv="float32")) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("ssm", "conv", "named"), [("float16", "auto", "ssm"), ("auto", "fp8", "mamba_cache_dtype")])
def test_a_dtype_that_cannot_hold_a_state_is_refused(ssm, conv, named):
    with pytest.raises(ValueError, match=f"{named}.*use"):
        state_dtypes(configured(ssm=ssm, conv=conv))


def test_layers_without_a_recurrence_keep_no_state():
    layout = LayoutSpec.read("asim2gk").resolve(GEOMETRY).layers
    assert [has_state(spec) for spec in layout] == [False, False, False, True, True, True, True]
    assert state_page_bytes(configured("aas")) == state_page_bytes(configured("i")) == 0


def test_a_page_holds_the_largest_state():
    single = {letter: state_page_bytes(configured(letter)) for letter in "m2gk"}
    assert state_page_bytes(configured("amg2k")) == max(single.values())
    heads, groups, width = 4, 2, 16
    conv = (heads + 2 * groups) * width * 3 * 2
    assert heads * width * width * 4 + conv <= single["g"] < heads * width * width * 4 + conv + 128


def test_ranks_share_a_state():
    assert state_page_bytes(configured("g", num_ranks=2)) == state_page_bytes(configured("g")) // 2


def test_a_bf16_state_takes_half():
    whole = state_page_bytes(configured("k", conv="bfloat16"))
    assert state_page_bytes(configured("k", ssm="bfloat16")) < 0.62 * whole


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.32.5.dev3+g1234", "0.29.1+cpu"])
def test_known_versions_are_accepted(version):
    assert version_problem(version) is None


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0.0", "0.1.dev1", "dev"])
def test_other_versions_are_named_with_the_remedy(version):
    problem = version_problem(version)
    assert problem is not None
    assert version in problem
    assert "pip install 'vllm>=0.26,<0.33'" in problem

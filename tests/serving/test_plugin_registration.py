"""The plugin's entry: light to import, and what it says where it cannot serve."""

import subprocess
import sys

import pytest

from hybridize.serving.registration import refused_model


def test_the_entry_point_imports_nothing_heavy():
    code = "import sys, hybridize.serving; print(sorted({'torch', 'transformers', 'vllm'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_refused_model_says_why():
    model = refused_model("HybridOtherForCausalLM", "vllm: no such family; convert another teacher")
    assert model.__name__ == "HybridOtherForCausalLM"
    with pytest.raises(ValueError, match="no such family; convert another teacher"):
        model(vllm_config=None, prefix="")

"""Tiny teachers of both families, and a real one where its files are at hand."""

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hybridize.models import convert_model
from hybridize.spec import LayoutSpec, Mamba1Spec

NUM_LAYERS = 4
MIXER = Mamba1Spec(state_size=4)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build_teacher(family, **changes):
    torch.manual_seed(0)
    if family == "mistral":
        config = MistralConfig(**SIZES | {"sliding_window": 6} | changes)
        return MistralForCausalLM(config).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"tie_word_embeddings": True} | changes)).eval()


@pytest.fixture(params=["llama", "mistral"])
def family(request):
    return request.param


@pytest.fixture
def teacher(family):
    return build_teacher(family)


@pytest.fixture
def make_teacher():
    return build_teacher


@pytest.fixture
def make_hybrid():
    def make(teacher, replaced, mixer=MIXER, **options):
        torch.manual_seed(1)
        num_layers = teacher.config.num_hidden_layers
        return convert_model(teacher, LayoutSpec.replace(num_layers, replaced, mixer), **options)

    return make


@pytest.fixture
def hybrid(teacher, make_hybrid):
    """Layer 0 is a mixer, so that nothing may take its length or cache for an attention layer's."""
    return make_hybrid(teacher, [0, 2])


@pytest.fixture
def draw_tokens():
    def draw(*shape, seed=0):
        return torch.randint(2, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def stories():
    """The folder of a small Llama trained on stories."""
    data = Path(os.environ.get("HYBRIDIZE_DATA", Path(__file__).parents[3] / "shared" / "data"))
    folder = data / "models" / "stories260K_hf"
    if not folder.is_dir():
        pytest.skip(f"no trained model at {folder}; set HYBRIDIZE_DATA")
    return folder

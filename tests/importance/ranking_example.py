"""Tiny teachers of both families, packed random rows, and a stage that ranks in a moment."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hybridize.importance import LayerOrder, Ranking
from hybridize.spec import Mamba1Spec
from hybridize.spec.stages import RankStage
from tiny_families import SIZES

VOCABULARY = SIZES["vocab_size"]
LENGTH = 24


def build_teacher(family="mistral", **changes):
    torch.manual_seed(0)
    if family == "mistral":
        model = MistralForCausalLM(MistralConfig(**SIZES | {"sliding_window": 6, "eos_token_id": None} | changes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES | {"tie_word_embeddings": True, "eos_token_id": None} | changes))
    return model.eval().requires_grad_(False)


def draw_batch(seed, rows=2, lengths=(9, 15)):
    """Packed rows of random documents, the first third of each a prompt."""
    generator = torch.Generator().manual_seed(seed)
    places = [torch.arange(length) for length in lengths]
    positions = torch.cat(places)
    valid = torch.cat([(p >= len(p) // 3) & (p < len(p) - 1) for p in places])
    return {
        "input_ids": torch.randint(2, VOCABULARY, (rows, len(positions)), generator=generator),
        "position_ids": positions.expand(rows, -1).clone(),
        "valid": valid.expand(rows, -1).clone(),
    }


def rank_stage(**changes):
    settings = {
        "name": "rank",
        "mixer": Mamba1Spec(state_size=4),
        "steps": 3,
        "tokens_per_step": 2 * LENGTH,
        "sequence_length": LENGTH,
        "learning_rate": 1e-2,
    }
    return RankStage(**settings | changes)


def ranking_of(scores=None, **changes):
    """A ranking by hand."""
    scores = {0: 0.5, 1: 0.25, 3: 0.25, 5: 2.0} if scores is None else scores
    layers = tuple(sorted(scores))
    fields = {
        "method": "mmr",
        "layers": layers,
        "order": tuple(sorted(layers, key=lambda layer: (scores[layer], layer))),
        "num_layers": 6,
        "mixer": Mamba1Spec(d_inner=64, d_xb=32, dt_rank=4),
        "scores": scores,
        "before": {layer: 2 * score for layer, score in scores.items()},
        "settings": {"steps": 3, "seed": 0},
        "cost": {"tokens": 100, "seconds": 1.5},
        "controls": {
            "uniform": LayerOrder("uniform", layers, None),
            "random": LayerOrder("random", layers, layers[::-1]),
        },
    }
    return Ranking(**fields | changes)

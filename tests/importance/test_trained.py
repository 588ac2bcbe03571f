"""What scorers say of a trained teacher: a 16-layer Mistral that solves the reasoning world."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hybridize.data.packing import pack_rows
from hybridize.data.world import draw_problem
from hybridize.evaluation import evaluate_problems
from hybridize.importance import rank_correlation, rank_layers
from hybridize.importance.changes import left_out
from hybridize.models import load_teacher
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.spec.data import WorldDataSpec
from hybridize.spec.stages import RankStage
from hybridize.transfer import convert

FOLDER = Path(__file__).parents[2] / "models" / "pocket-teacher"
LENGTH = 256


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(FOLDER, dtype=torch.float32).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def rows(tokenizer):
    return pack_rows(WorldDataSpec(levels=(1, 2)), tokenizer, LENGTH, 8, seed=0)


@pytest.fixture(scope="module")
def rank(teacher, rows, tmp_path_factory):
    """Rankings of the teacher by method, on some of the rows; each made once."""

    @cache
    def make(first=0, last=3, **settings):
        stage = RankStage(name="rank", sequence_length=LENGTH, tokens_per_step=LENGTH, steps=2, **settings)
        heldout = [rows.collate([rows[row]]) for row in range(first, last)]
        return rank_layers(teacher, teacher, (), heldout, stage, state_dir=tmp_path_factory.mktemp("state"))

    return make


def test_the_whole_teacher_knows_the_answers(rank):
    assert 0 < rank(method="loo").baseline < 1e-3


@pytest.mark.parametrize("rows_of", [(0, 3), (3, 6)])
def test_some_layers_matter_and_others_do_not_whatever_the_rows(rank, rows_of):
    """The same on rows of other documents: leaving out 0 or 1 is ruin, leaving out 6 is nothing."""
    scores = rank(*rows_of, method="loo").scores
    assert set(sorted(scores, key=scores.get)[-2:]) == {0, 1}
    assert min(scores[0], scores[1]) > 1
    assert scores[6] < 1e-3


def test_leaving_the_block_out_costs_more_than_leaving_attention_out(rank):
    mixer, block = rank(method="loo"), rank(method="loo", identity="block")
    assert mixer.baseline == block.baseline
    assert sum(block.scores.values()) > sum(mixer.scores.values())


def test_a_mixer_as_initialised_ranks_layers_much_like_no_mixer_at_all(rank):
    assert rank_correlation(rank(method="perplexity"), rank(method="loo")) > 0.7


def test_a_wider_window_hurts_less_and_one_as_long_as_the_row_not_at_all(rank):
    none, narrow, wide = (rank(method="window", window=window) for window in (LENGTH, 1, 64))
    assert set(none.scores.values()) == {none.baseline}
    assert max(narrow.scores.values()) > 1
    assert sum(none.scores.values()) < sum(wide.scores.values()) < sum(narrow.scores.values())


@pytest.mark.parametrize("identity", ["mixer", "block"])
def test_answers_without_layer_0_are_ruined_and_without_layer_6_are_right(teacher, tokenizer, identity):
    problems = [draw_problem("addition", 1, "train", index, seed=1) for index in range(8)]

    def accuracy(model):
        return evaluate_problems(model, tokenizer, problems, len(problems))["overall"]["accuracy"]

    assert accuracy(teacher) == 1
    for layer, expected in ((0, 0.0), (6, 1.0)):
        with left_out(teacher, layer, identity):
            assert accuracy(teacher) == pytest.approx(expected, abs=0.13)


def test_a_layer_left_out_writes_the_same_with_and_without_a_cache(teacher, tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "What is 17 + 25?"}], add_generation_prompt=True)
    ids = torch.tensor([text["input_ids"] if hasattr(text, "keys") else text])
    options = {"max_new_tokens": 24, "do_sample": False}
    for layer in (0, 5, 15):
        with left_out(teacher, layer, "mixer"):
            assert torch.equal(teacher.generate(ids, **options), teacher.generate(ids, **options, use_cache=False))


def test_kl_restores_what_matters_most_in_a_trained_hybrid(teacher, rows, tmp_path):
    """Of layers 0, 1, 6 and 8, the other way round than leaving out: putting 0 or 1 back brings the most."""
    kept = (0, 1, 6, 8)
    hybrid, _ = convert(
        teacher, LayoutSpec.replace(16, [layer for layer in range(16) if layer not in kept], Mamba1Spec())
    )
    stage = RankStage(
        name="rank", method="kl", sequence_length=LENGTH, tokens_per_step=LENGTH, steps=2, learning_rate=1e-3
    )
    batches = [rows.collate([rows[row]]) for row in range(2)]
    heldout = [rows.collate([rows[row]]) for row in range(2, 4)]
    ranking = rank_layers(hybrid.requires_grad_(False), teacher, batches, heldout, stage, state_dir=tmp_path)
    assert ranking.layers == kept
    assert set(ranking.order[2:]) == {0, 1}
    assert min(ranking.scores[0], ranking.scores[1]) > max(ranking.scores[6], ranking.scores[8]) + 0.1

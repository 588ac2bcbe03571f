"""KL-guided selection: the aligned all-mixer student, one layer of attention restored, and what that brings."""

import pytest
import torch
from ranking_example import build_teacher, draw_batch, rank_stage

from hybridize.importance import kl, rank_layers
from hybridize.importance.rows import Rows, shared_copy
from hybridize.importance.steps import rate_at
from hybridize.losses.divergence import dense_divergence
from hybridize.models import attention_module, layout_of
from hybridize.spec import Mamba1Spec
from hybridize.spec.base import StoppedError
from hybridize.transfer import convert
from tiny_families import NUM_LAYERS
from tiny_families import build_teacher as build_family

MIXER = Mamba1Spec(state_size=4)


@pytest.fixture
def stage():
    return rank_stage(method="kl")


def all_mixers(model, layers=range(NUM_LAYERS)):
    student, _ = convert(model, layout_of(model.config).with_replaced(layers, MIXER))
    return student.requires_grad_(False)


def mixers_of(student, layers):
    return {layer: attention_module(student, layer).requires_grad_(True) for layer in layers}


def plain_loss(student, teacher, batches):
    """Whole models, whole logits, per valid position."""
    total, count = 0.0, 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        valid = batch["valid"].flatten()
        logits = [model(**inputs, use_cache=False).logits.flatten(0, 1) for model in (student, teacher)]
        total = total + dense_divergence(*logits, valid_T=valid, reduction="sum")
        count += int(valid.sum())
    return total / count


def plain_training(parameters, losses, stage):
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))
    for step, loss in enumerate(losses):
        optimizer.param_groups[0]["lr"] = rate_at(step, stage)
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def align(student, mixers, model, batches, stage):
    """Each mixer by itself, on what its attention is given by a whole forward of the model."""
    for layer, mixer in mixers.items():

        def loss(batch, layer=layer, mixer=mixer):
            seen = {}

            def catch(_, args, kwargs, output):
                seen["input"], seen["output"] = kwargs["hidden_states"], output[0]

            handle = attention_module(model, layer).register_forward_hook(catch, with_kwargs=True)
            with torch.no_grad():
                model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
            handle.remove()
            starts = batch["position_ids"] == 0
            given, _ = mixer(seen["input"], mixer_starts=starts)
            return (given - seen["output"]).square().mean() / seen["output"].square().mean()

        plain_training(list(mixer.parameters()), [lambda b=b: loss(b) for b in batches], stage)


def test_scores_are_those_of_whole_students_trained_plainly(batches, heldout, stage, tmp_path):
    """Aligned, one layer restored, distilled, measured: by whole models, without any of what makes it cheap."""
    teacher = build_teacher("mistral")
    ranking = rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path)

    def divergence(restored):
        student = all_mixers(teacher)
        mixers = mixers_of(student, range(NUM_LAYERS))
        align(student, mixers, teacher, batches, stage)
        parameters = [p for layer, mixer in mixers.items() if layer != restored for p in mixer.parameters()]
        if restored is not None:
            path = f"model.layers.{restored}.self_attn"
            student.set_submodule(path, teacher.get_submodule(path))
        plain_training(parameters, [lambda b=b: plain_loss(student, teacher, [b]) for b in batches], stage)
        with torch.no_grad():
            return float(plain_loss(student, teacher, heldout))

    baseline = divergence(None)
    assert ranking.baseline == pytest.approx(baseline, rel=1e-3)
    for layer in (0, 2):
        assert ranking.scores[layer] == pytest.approx(baseline - divergence(layer), rel=1e-2, abs=1e-3)
    assert ranking.before is None
    assert ranking.cost["tokens"] == (NUM_LAYERS + 2) * stage.steps * stage.tokens_per_step


def test_alignment_brings_mixers_nearer_to_their_attention():
    teacher, stage = build_teacher("llama"), rank_stage(method="kl", steps=60)
    batches = [draw_batch(seed, rows=8) for seed in range(stage.steps)]

    def error(mixers):
        found = {}
        handles = []
        for layer, mixer in mixers.items():

            def compare(_, args, kwargs, output, layer=layer, mixer=mixer):
                starts = heldout["position_ids"] == 0
                given, _none = mixer(kwargs["hidden_states"], mixer_starts=starts)
                found[layer] = float((given - output[0]).square().mean() / output[0].square().mean())

            handles.append(attention_module(teacher, layer).register_forward_hook(compare, with_kwargs=True))
        with torch.no_grad():
            teacher(input_ids=heldout["input_ids"], position_ids=heldout["position_ids"], use_cache=False)
        for handle in handles:
            handle.remove()
        return found

    heldout = draw_batch(100, rows=16)
    mixers = mixers_of(all_mixers(teacher), range(NUM_LAYERS))
    before = error(mixers)
    source = shared_copy(teacher)
    rows = [Rows(batch, torch.device("cpu")) for batch in batches]
    kl.align(source, mixers, rows, stage, lambda _: None)
    after = error(mixers)
    assert all(after[layer] < 0.9 * before[layer] for layer in mixers), (before, after)


def test_on_a_hybrid_only_attention_left_is_restored(batches, heldout, stage, tmp_path):
    teacher = build_teacher("llama")
    hybrid = all_mixers(teacher, [0, 2])
    before = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    ranking = rank_layers(hybrid, teacher, batches, heldout, stage, state_dir=tmp_path)
    assert ranking.layers == (1, 3)
    assert set(ranking.scores) == {1, 3}
    assert hybrid.config.layout.replaced == (0, 2)
    for name, tensor in hybrid.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in hybrid.parameters())


def test_the_last_layer_of_attention_needs_no_training(batches, heldout, stage, tmp_path):
    """With one layer to rank, restoring it gives the hybrid back."""
    teacher = build_teacher("llama")
    hybrid = all_mixers(teacher, [0, 1, 3])
    ranking = rank_layers(hybrid, teacher, batches, heldout, stage, state_dir=tmp_path)
    with torch.no_grad():
        own = float(plain_loss(hybrid, teacher, heldout))
    assert ranking.scores[2] == pytest.approx(ranking.baseline - own, rel=1e-4)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [2, 5, 11])  # in the alignment, in the baseline, in a layer
def test_resumed_equals_uninterrupted_and_trains_nothing_twice(batches, heldout, stage, tmp_path, at, monkeypatch):
    teacher = build_teacher("llama")
    tried = []
    honest = kl._Trials.try_layer

    def spy(self, layer, on_step):
        tried.append(layer)
        return honest(self, layer, on_step)

    monkeypatch.setattr(kl._Trials, "try_layer", spy)

    def rank(folder, **options):
        return rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path / folder, **options)

    whole = rank("whole")
    assert tried == [-1, 0, 1, 2, 3]

    def kill(done, total):
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        rank("killed", on_progress=kill)
    tried.clear()
    if at > stage.steps:
        monkeypatch.setattr(kl, "align", None)
    progress = []
    resumed = rank("killed", on_progress=lambda done, total: progress.append(done))
    assert tried == [-1, 0, 1, 2, 3][max(0, at // stage.steps - 1) :]
    assert (resumed.scores, resumed.baseline) == (whole.scores, whole.baseline)
    assert progress == sorted(progress)
    assert progress[-1] == 6 * stage.steps


def test_an_aligned_student_of_other_settings_is_not_used(batches, heldout, stage, tmp_path):
    teacher = build_teacher("llama")
    rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path / "old")
    other = rank_stage(method="kl", learning_rate=2e-2)
    fresh = rank_layers(teacher, teacher, batches, heldout, other, state_dir=tmp_path / "new")
    assert rank_layers(teacher, teacher, batches, heldout, other, state_dir=tmp_path / "old").scores == fresh.scores
    for file in (tmp_path / "new").glob("layer-*.json"):
        file.unlink()
    (tmp_path / "new" / kl.ALIGNED_FILE).write_bytes(b"damaged")
    assert rank_layers(teacher, teacher, batches, heldout, other, state_dir=tmp_path / "new").scores == fresh.scores


def test_a_loss_that_is_no_number_stops_and_names_the_place(batches, heldout, stage, tmp_path):
    model = build_teacher("llama")
    attention_module(model, 1).v_proj.weight[0, 0] = float("inf")
    teacher = build_teacher("llama")
    with pytest.raises(StoppedError, match=r"layer 1: the loss is nan at step 1 of the alignment; lower learning_rate"):
        rank_layers(model, teacher, batches, heldout, stage, state_dir=tmp_path)
    with pytest.raises(ValueError, match="batches: 1 are given for 3 steps"):
        rank_layers(teacher, teacher, batches[:1], heldout, stage, state_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_type", ["gpt_neox", "qwen3", "mixtral"])
def test_other_families_are_ranked_too(model_type, batches, heldout, tmp_path):
    teacher = build_family(model_type)
    stage = rank_stage(method="kl", mixer=Mamba1Spec(state_size=8))  # as wide as a head, whose norms Qwen's mixers keep
    ranking = rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path)
    assert len(set(ranking.scores.values())) == NUM_LAYERS


def test_half_precision_is_trained_in_fp32_mixers(batches, heldout, stage, tmp_path):
    half, exact = build_teacher("llama").to(torch.bfloat16), build_teacher("llama")
    rankings = [
        rank_layers(model, model, batches, heldout, stage, state_dir=tmp_path / str(model.dtype))
        for model in (half, exact)
    ]
    assert rankings[0].baseline == pytest.approx(rankings[1].baseline, rel=0.1)


def test_activations_computed_again_change_no_score(batches, heldout, stage, tmp_path):
    teacher = build_teacher("mistral")
    rankings = [
        rank_layers(teacher, teacher, batches, heldout, stage, state_dir=tmp_path / name, checkpoint=checkpoint)
        for name, checkpoint in (("a", False), ("b", True))
    ]
    assert rankings[0].scores == pytest.approx(rankings[1].scores, rel=1e-4)

"""Every family of the table: what surgery promises holds for the real class of each, with tiny random weights."""

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hybridize.importance.changes import windowed
from hybridize.mixers import MIXERS
from hybridize.models import FAMILIES, attention_module, convert_model, logit_rule_of, swap_layer
from hybridize.models.checkpoint import load_model, load_teacher, weight_files
from hybridize.spec import AttentionSpec, IdentitySpec, LayoutSpec, Mamba1Spec, SlidingWindowSpec
from hybridize.transfer import convert
from hybridize.transfer.rules import RULES
from tiny_families import FULL, NUM_LAYERS, SIZES, SLIDING, TINY, build_teacher

MIXER = Mamba1Spec(state_size=4)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
TYPES = {
    "mistral": [SLIDING] * 4,
    "ministral": [SLIDING, FULL] * 2,
    "qwen2": [FULL, FULL, SLIDING, SLIDING],
    "qwen3": [FULL, FULL, SLIDING, SLIDING],
    "gemma2": [SLIDING, FULL] * 2,
    "gemma3_text": [SLIDING, FULL] * 2,
    "smollm3": [FULL, SLIDING] * 2,
    "starcoder2": [SLIDING] * 4,
    "cohere2": [SLIDING, FULL] * 2,
}


def replace(teacher, *replaced, **options):
    torch.manual_seed(1)
    return convert_model(teacher, LayoutSpec.replace(NUM_LAYERS, replaced, MIXER), **options)


def draw(*shape, seed=0):
    return torch.randint(2, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def teacher(family):
    return build_teacher(family.model_type)


@pytest.fixture(scope="module")
def hybrid(teacher):
    """Layers 0 and 3 are mixers: where kinds of attention take turns, one of each is left and one is gone."""
    return replace(teacher, 0, 3)


@pytest.fixture(scope="module")
def saved(teacher, hybrid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    teacher.save_pretrained(folder / "teacher")
    hybrid.save_pretrained(folder / "hybrid")
    return folder


def disk_tensors(folder):
    tensors = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def test_every_row_has_a_tiny_model():
    assert TINY.keys() == FAMILIES.keys()


def test_all_attention_is_the_teacher_bit_for_bit(teacher):
    same = replace(teacher, share=True)
    tokens = draw(2, 17)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    positions = torch.cat([torch.arange(8), torch.arange(9)]).expand(2, -1)
    for inputs in ({}, {"attention_mask": mask}, {"position_ids": positions, "use_cache": False}):
        with torch.no_grad():
            assert torch.equal(same(tokens, **inputs).logits, teacher(tokens, **inputs).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(same.generate(tokens, **options), teacher.generate(tokens, **options))


def test_kinds_of_attention_survive(family, teacher, hybrid, saved):
    expected = TYPES.get(family.model_type, [FULL] * NUM_LAYERS)
    assert family.attention_types(teacher.config) == expected
    assert hybrid.config.attention_types == expected
    assert hybrid.config.layer_types[1:3] == expected[1:3]
    assert {hybrid.config.layer_types[0], hybrid.config.layer_types[3]} <= {"linear_attention", "hybrid"}
    assert hybrid.base_model.config.layer_types == expected
    stored = json.loads((saved / "hybrid" / "config.json").read_text())
    assert stored["attention_types"] == expected
    for layer in (1, 2):
        kept, own = attention_module(hybrid, layer), attention_module(teacher, layer)
        for name in ("sliding_window", "use_rope", "layer_type", "is_sliding", "scaling"):
            assert getattr(kept, name, None) == getattr(own, name, None), name


def test_cache_bounds_the_layers_that_slide(family, hybrid):
    expected = TYPES.get(family.model_type, [FULL] * NUM_LAYERS)
    for config in (hybrid.config, hybrid.base_model.config):
        cache = DynamicCache(config=config)
        assert cache.is_sliding[1:3] == [kind == SLIDING for kind in expected[1:3]]
        assert [isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers] == [
            True,
            False,
            False,
            True,
        ]


def test_untouched_tensors_keep_name_and_bits(family, teacher, hybrid, saved):
    """In memory, and on disk, where a mixture of experts is split in another way."""
    gone = tuple(f"{family.attention_path(layer)}." for layer in (0, 3))
    on_disk = disk_tensors(saved / "teacher"), disk_tensors(saved / "hybrid")
    for before, after in ((teacher.state_dict(), hybrid.state_dict()), on_disk):
        kept = {name for name in before if not name.startswith(gone)}
        assert len(kept) < len(before)
        assert kept == {name for name in after if not name.startswith(gone)}
        assert all(torch.equal(before[name], after[name]) for name in kept)
        assert all(".mixer." in name for name in after.keys() - kept)


@pytest.mark.parametrize("loader", [load_model, AutoModelForCausalLM.from_pretrained])
def test_saved_hybrid_comes_back_bit_for_bit(hybrid, saved, loader):
    loaded = loader(saved / "hybrid").eval()
    assert type(loaded) is type(hybrid)
    before, after = hybrid.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(draw(2, 9)).logits, hybrid(draw(2, 9)).logits)


def test_saved_teacher_is_loaded_by_the_table(teacher, saved):
    with torch.no_grad():
        assert torch.equal(load_teacher(saved / "teacher")(draw(2, 9)).logits, teacher(draw(2, 9)).logits)


@pytest.mark.parametrize("replaced", [(0, 3), (0, 2), (1, 3), (0, 1, 2, 3)], ids=str)
def test_cached_generation_equals_uncached(teacher, replaced):
    """Also with every layer of one kind of attention gone, and with every layer."""
    hybrid = replace(teacher, *replaced, share=True)
    options = {"max_new_tokens": 7, "do_sample": False}
    tokens = draw(2, 5)
    assert torch.equal(hybrid.generate(tokens, **options), hybrid.generate(tokens, use_cache=False, **options))


def test_stepwise_logits_equal_full_logits(hybrid):
    tokens = draw(2, 14)
    cache = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        chunks = [hybrid(part, past_key_values=cache).logits for part in tokens.split((5, 1, 1, 3, 4), dim=1)]
        whole = hybrid(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, rtol=1e-3, atol=1e-4)


def test_left_padded_batch_equals_each_prompt_alone(hybrid):
    prompts = [draw(1, 3), draw(1, 7, seed=1)]
    padded = torch.cat([torch.nn.functional.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    options = {"max_new_tokens": 8, "do_sample": False}
    together = hybrid.generate(padded, attention_mask=(padded != 0).long(), **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = hybrid.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(row[-8:], alone[0, -8:])


def test_packed_documents_equal_separate_ones(hybrid):
    lengths = (1, 7, 3, 9)
    tokens = draw(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed, whole = hybrid(tokens, position_ids=positions).logits, hybrid(tokens).logits
        apart = [hybrid(document).logits for document in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), **TOLERANCE)
    assert not torch.allclose(packed, whole, rtol=1e-2, atol=1e-2)


def test_logits_do_not_see_the_future(hybrid):
    tokens = draw(1, 16)
    changed = tokens.clone()
    changed[0, 9:] = draw(1, 7, seed=1)
    with torch.no_grad():
        before, after = hybrid(tokens).logits, hybrid(changed).logits
    torch.testing.assert_close(before[:, :9], after[:, :9], **TOLERANCE)
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_gradient_checkpointing_gives_the_same_gradients(teacher):
    hybrid = replace(teacher, 0, 3).train()
    assert hybrid.supports_gradient_checkpointing
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    inputs = {"input_ids": draw(1, 12), "position_ids": positions, "labels": draw(1, 12), "use_cache": False}

    def gradients():
        hybrid.zero_grad()
        hybrid(**inputs).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in hybrid.named_parameters()}

    plain = gradients()
    enable = getattr(hybrid, "activation_checkpointing_enable", None)  # not in every release supported
    (enable or hybrid.gradient_checkpointing_enable)()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_head_and_logit_rule_give_the_logits(hybrid):
    """A loss that applies the head to the base model's hidden states itself needs nothing more."""
    rule, head = logit_rule_of(hybrid.config), hybrid.get_output_embeddings()
    with torch.no_grad():
        logits = head(hybrid.base_model(draw(2, 9), use_cache=False).last_hidden_state) * rule.scale
        if rule.softcap is not None:
            logits = rule.softcap * torch.tanh(logits / rule.softcap)
        torch.testing.assert_close(logits, hybrid(draw(2, 9)).logits)


def test_copies_keep_one_config_for_model_and_body(hybrid):
    with torch.no_grad():
        expected = hybrid(draw(1, 8)).logits
        for twin in (copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
            assert torch.equal(twin(draw(1, 8)).logits, expected)
            assert twin.base_model.config.get_text_config() is twin.config
            twin.config.use_cache = False
            assert twin.base_model.config.use_cache is False
    shallow = copy.copy(hybrid.base_model.config)
    shallow.use_cache = False
    assert hybrid.config.use_cache is True
    assert repr(hybrid.base_model.config).partition(" ")[2] == repr(hybrid.config).partition(" ")[2]


def test_layer_swapped_out_and_back_is_the_teacher(teacher):
    hybrid = replace(teacher, share=True)
    tokens = draw(2, 9)
    with torch.no_grad():
        old = swap_layer(hybrid, 1, MIXER)
        assert not torch.equal(hybrid(tokens).logits, teacher(tokens).logits)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(hybrid.generate(tokens, **options), hybrid.generate(tokens, use_cache=False, **options))
        swap_layer(hybrid, 1, old)
        assert torch.equal(hybrid(tokens).logits, teacher(tokens).logits)


def test_attention_implementation_reaches_the_body(hybrid):
    before = hybrid.config._attn_implementation
    hybrid.set_attn_implementation("eager")
    try:
        assert attention_module(hybrid, 1).config._attn_implementation == "eager"
    finally:
        hybrid.set_attn_implementation(before)


def layouts_of_all_mixers():
    """Every mixer there is a transfer to, in as few layouts as hold them; beside attention, windowed and not."""
    window, sink = SlidingWindowSpec(window=4), SlidingWindowSpec(window=5, sink=True)
    recurrent = [Mamba1Spec(state_size=8) if kind is Mamba1Spec else kind() for kind in MIXERS if kind in RULES]
    specs = [sink, IdentitySpec(), *recurrent, window]
    parts = [specs[first : first + NUM_LAYERS] for first in range(0, len(specs), NUM_LAYERS)]
    return [LayoutSpec(layers=(*part, *[AttentionSpec()] * (NUM_LAYERS - len(part)))) for part in parts]


@pytest.fixture(scope="module", params=layouts_of_all_mixers(), ids=str)
def mixed(request, teacher):
    """A conversion, of which every tensor is accounted for, and with sinks that matter."""
    hybrid, _ = convert(teacher, request.param, share=True)
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if name.endswith(".sink"):
                parameter.normal_(0.0, 2.0, generator=torch.Generator().manual_seed(0))
    return hybrid


def test_window_is_attention_under_a_narrower_mask(teacher):
    """Beside the teacher's attention, whose mask a hook narrows; also where the teacher's own window is smaller."""
    short, long = SlidingWindowSpec(window=4), SlidingWindowSpec(window=9)
    hybrid = convert_model(teacher, LayoutSpec(layers=(short, AttentionSpec(), AttentionSpec(), long)), share=True)
    tokens, before = draw(2, 17), teacher.config._attn_implementation
    for model in (teacher, hybrid):
        model.set_attn_implementation("eager")  # some releases forget Gemma 2's soft-cap elsewhere
    try:
        with torch.no_grad(), windowed(teacher, 0, 4), windowed(teacher, 3, 9):
            torch.testing.assert_close(hybrid(tokens).logits, teacher(tokens, use_cache=False).logits, **TOLERANCE)
    finally:
        teacher.set_attn_implementation(before)


def test_mixed_layout_is_causal_and_steps_as_it_reads(mixed):
    tokens = draw(2, 16)
    tokens[1, :9] = tokens[0, :9]
    cache = DynamicCache(config=mixed.config)
    with torch.no_grad():
        whole = mixed(tokens, use_cache=False).logits
        steps = [mixed(part, past_key_values=cache).logits for part in tokens.split((8, 1, 7), dim=1)]
    torch.testing.assert_close(whole[0, :9], whole[1, :9], **TOLERANCE)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(whole[0, 9:], whole[1, 9:])


def test_mixed_layout_generates_in_a_padded_batch_as_alone(mixed):
    tokens = torch.nn.functional.pad(draw(1, 5), (2, 0)).expand(2, -1).clone()
    tokens[1] = draw(1, 7, seed=1)
    options = {"max_new_tokens": 4, "do_sample": False}
    together = mixed.generate(tokens, attention_mask=(tokens != 0).long(), **options)
    alone = mixed.generate(
        tokens[:1, 2:], attention_mask=torch.ones(1, 5, dtype=torch.long), use_cache=False, **options
    )
    assert torch.equal(together[0, 2:], alone[0])


def test_identity_in_all_layers_still_counts_tokens(teacher):
    hybrid = convert_model(teacher, LayoutSpec(layers=(IdentitySpec(),) * NUM_LAYERS), share=True)
    cache = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        steps = [hybrid(part, past_key_values=cache).logits for part in draw(2, 8).split((6, 1, 1), dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), hybrid(draw(2, 8)).logits, **TOLERANCE)
    assert cache.get_seq_length() == 8


def test_mixed_layout_keeps_packed_documents_apart(mixed):
    lengths = (1, 7, 9)
    tokens = draw(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = mixed(tokens, position_ids=positions).logits
        apart = [mixed(document).logits for document in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), **TOLERANCE)


def test_mixed_layout_comes_back_from_disk(mixed, tmp_path):
    mixed.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    before, after = mixed.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(loaded(draw(2, 9)).logits, mixed(draw(2, 9)).logits)


def test_mixed_layout_keeps_its_exact_parts_in_half_precision(mixed, tmp_path):
    mixed.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    exact = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    wanted = (".A_log", ".mixer.D", ".dt_bias", ".dt_proj.bias", ".sink")
    assert exact == {name for name in mixed.state_dict() if name.endswith(wanted)}

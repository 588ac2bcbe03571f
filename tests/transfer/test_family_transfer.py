"""Every family of the table: its attention's tensors go where they belong, and what cannot go is told."""

import pytest
import torch
from torch.nn.functional import normalize
from transformers import DynamicCache

from hybridize.models import FAMILIES, attention_module, convert_model
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.transfer import convert, plan_conversion, replace_layer
from tiny_families import NUM_LAYERS, SIZES, build_teacher

MIXER = Mamba1Spec(state_size=4)
LAYOUT = LayoutSpec.replace(NUM_LAYERS, (0, 3), MIXER)
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
BIASES = {
    "llama": QKVO,
    "qwen2": QKVO[:3],
    "qwen3": QKVO,
    "olmo2": QKVO,
    "granite": QKVO,
    "starcoder2": QKVO,
    "gpt_neox": ["query_key_value", "dense"],
}
NORMED = {"qwen3", "gemma3_text", "olmo2", "qwen3_moe"}
WIDTH, HEAD_DIM = 32, 8


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def teacher(family):
    return build_teacher(family.model_type)


@pytest.fixture(scope="module")
def converted(teacher):
    return convert(teacher, LAYOUT, "published")


def parts(hybrid, teacher, family, layer):
    """The rows of the mixer's in_proj that stand for values, keys and queries."""
    kv_width = family.geometry(teacher.config).num_kv_heads * HEAD_DIM
    rows = attention_module(hybrid, layer).mixer.in_proj.weight.detach()
    return rows.split([WIDTH, kv_width, kv_width, WIDTH])[1:]


def test_plan_accounts_for_every_tensor(teacher, converted):
    hybrid, plan = converted
    plan.check(teacher.state_dict(), hybrid.state_dict())
    assert plan_conversion(teacher.config, list(teacher.state_dict()), LAYOUT, "published") == plan
    for name in plan.untouched:
        assert torch.equal(hybrid.state_dict()[name], teacher.state_dict()[name]), name
    assert not any(name in plan.untouched for transfer in plan.transfers.values() for name in transfer.used)


def test_biases_and_norms_are_carried_where_they_fit_or_dropped_and_told(family, teacher, converted):
    biases = [f"{name}.bias" for name in BIASES.get(family.model_type, [])]
    norms = ["q_norm.weight", "k_norm.weight"] if family.model_type in NORMED else []
    fitting = [] if family.norm_span == "head" else norms  # a norm of heads of 8 does not fit scan heads of 4
    bare = Mamba1Spec(state_size=4, qkv_bias=False, output_bias=False, qk_norm="none")
    _, without = convert(teacher, LayoutSpec.replace(NUM_LAYERS, (0, 3), bare), "published")
    for plan, dropped in ((converted[1], [n for n in norms if n not in fitting]), (without, biases + norms)):
        for layer, transfer in plan.transfers.items():
            prefix = f"{family.attention_path(layer)}."
            assert transfer.dropped.keys() == {prefix + name for name in dropped}
            assert {prefix + name for name in biases + norms if name not in dropped} <= transfer.used.keys()
        lines = str(plan).splitlines()
        for name in dropped:
            reason = "is to have no such bias"
            if name in norms:
                reason = "is not to normalise what stands for queries and keys"
            assert lines.count(f"  {name}: dropped, since the mamba1 mixer {reason}") == 2
        assert lines[0].endswith(f", {2 * len(dropped)} dropped" if dropped else "tensors untouched")


def test_values_and_keys_are_those_of_the_teacher(family, teacher, converted):
    """Read from the teacher's own cache: at position 0, where no rotary embedding turns a key."""
    inputs = {}
    hooks = [
        attention_module(teacher, layer).register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: inputs.update({layer: kwargs.get("hidden_states", *args[:1])}),
            with_kwargs=True,
        )
        for layer in (0, 3)
    ]
    seen = []
    with torch.no_grad():
        for token in (5, 9):
            cache = DynamicCache(config=teacher.config)
            teacher(torch.tensor([[token]]), past_key_values=cache)
            seen += [{layer: (inputs[layer][0, 0], cache.layers[layer]) for layer in (0, 3)}]
    for hook in hooks:
        hook.remove()
    for layer in (0, 3):
        (first_E, first), (second_E, second) = (run[layer] for run in seen)
        x, b, _ = parts(converted[0], teacher, family, layer)
        # A difference knows no bias.
        torch.testing.assert_close(x @ (first_E - second_E), (first.values - second.values).flatten())
        if family.model_type not in NORMED:
            keys = (first.keys - second.keys).flatten()
            torch.testing.assert_close(normalize(b @ (first_E - second_E), dim=0), normalize(keys, dim=0))


def test_queries_and_output_are_those_of_the_teacher(family, teacher, converted):
    for layer in (0, 3):
        attention = attention_module(teacher, layer)
        queries = parts(converted[0], teacher, family, layer)[2]
        if family.model_type == "phi3":
            expected = attention.qkv_proj.weight[:WIDTH]
        elif family.model_type == "gpt_neox":
            expected = attention.query_key_value.weight.unflatten(0, (-1, 3, HEAD_DIM))[:, 0].flatten(0, 1)
        else:
            expected = attention.q_proj.weight
        assert torch.equal(queries, expected)
        output = attention.get_submodule(family.o).weight
        assert torch.equal(attention_module(converted[0], layer).mixer.out_proj.weight, output)


def test_every_row_of_a_projection_is_used_once(family, teacher):
    geometry = family.geometry(teacher.config)
    rows = {}
    for part in family.projections(geometry):
        weight = attention_module(teacher, 0).get_submodule(part.name).weight
        rows.setdefault(part.name, []).extend(range(len(weight)) if part.rows is None else part.rows)
        assert sorted(rows[part.name]) == sorted(set(rows[part.name]))
    for name, used in rows.items():
        assert len(used) == len(attention_module(teacher, 0).get_submodule(name).weight)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_and_router_are_left_alone(model_type):
    teacher = build_teacher(model_type)
    _, plan = convert(teacher, LAYOUT)
    experts = {name for name in teacher.state_dict() if ".mlp.experts." in name or ".mlp.gate." in name}
    assert len(experts) >= 3 * (NUM_LAYERS - 1)
    assert experts <= set(plan.untouched)


def test_random_init_carries_nothing_over(family, teacher):
    hybrid, plan = convert(teacher, LAYOUT, "random")
    plan.check(teacher.state_dict(), hybrid.state_dict())
    gone = tuple(f"{family.attention_path(layer)}." for layer in (0, 3))
    assert plan.dropped.keys() == {name for name in teacher.state_dict() if name.startswith(gone)}


def test_layer_by_layer_equals_all_at_once(teacher):
    once, _ = convert(teacher, LAYOUT, seed=3)
    in_place = convert_model(teacher, LayoutSpec.replace(NUM_LAYERS, (), MIXER), share=True)
    for layer in (0, 3):
        replace_layer(in_place, layer, MIXER, seed=3)
    staged, _ = convert(convert(teacher, LayoutSpec.replace(NUM_LAYERS, (3,), MIXER), seed=3)[0], LAYOUT, seed=3)
    assert staged.config.to_dict() == once.config.to_dict()
    tokens = torch.arange(2, SIZES["vocab_size"])[None, :20]
    with torch.no_grad():
        for hybrid in (in_place, staged):
            assert torch.equal(hybrid(tokens).logits, once(tokens).logits)

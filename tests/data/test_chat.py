import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridize.data.chat import check_chat_template, render, render_many, render_prompt

PLAIN = """\
{%- for message in messages -%}
{{- '<' + message.role + '>' + message.content + '<end>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}
"""
# As some reasoning models do: thinking is cut from all answers, and an answer opens otherwise than asked for.
REWRITING = PLAIN.replace("{{- '<assistant>' -}}", "{{- '<assistant><think>' -}}")

messages = st.lists(
    st.tuples(st.text("ab cd.\n", max_size=12), st.text("ab cd.\n", max_size=12)), min_size=1, max_size=3
).map(
    lambda turns: [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
)


def byte_tokenizer(template):
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = byte_tokenizer(PLAIN)


@settings(deadline=None, derandomize=True)
@given(messages=messages)
def test_the_prompt_is_a_prefix_and_the_completion_the_answer(messages):
    rendered = render(TOKENIZER, messages)
    prompt = render_prompt(TOKENIZER, messages[:-1])
    assert rendered.input_ids[: rendered.num_prompt_tokens] == prompt
    completion = rendered.input_ids[rendered.num_prompt_tokens :]
    assert TOKENIZER.decode(completion) == messages[-1]["content"] + "<end>"
    assert all(isinstance(token, int) for token in rendered.input_ids)


def test_the_prompt_opens_the_assistants_message():
    ids = render_prompt(TOKENIZER, [{"role": "user", "content": "hi"}])
    assert TOKENIZER.decode(ids) == "<user>hi<end><assistant>"


@pytest.mark.parametrize("template", [None, ""])
def test_a_tokenizer_without_a_template_is_named_with_the_remedy(template):
    tokenizer = byte_tokenizer(template)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    calls = (check_chat_template, lambda t: render_prompt(t, talk[:1]), lambda t: render(t, talk))
    for call in calls:
        with pytest.raises(ValueError, match=r"tokenizer .*: it has no chat template; set tokenizer\.chat_template"):
            call(tokenizer)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ValueError, match="tokenizer some/model: "):
        check_chat_template(tokenizer)


def test_a_template_that_rewrites_the_prompt_is_refused():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template: the prompt alone is not a prefix"):
        render(byte_tokenizer(REWRITING), talk)


@given(st.lists(messages, max_size=5))
@settings(max_examples=30, deadline=None)
def test_many_are_rendered_as_one_by_one(conversations):
    places = [str(i) for i in range(len(conversations))]
    assert render_many(TOKENIZER, conversations, places) == [render(TOKENIZER, one) for one in conversations]


def test_of_many_the_one_that_the_template_does_not_take_is_named():
    template = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}" + PLAIN
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=r"^row 2: the tokenizer's chat template does not take it \(no system\)"):
        render_many(byte_tokenizer(template), [good, bad, good], ["row 1", "row 2", "row 3"])
    rewriting = byte_tokenizer(REWRITING)
    with pytest.raises(ValueError, match=r"^row 1: .*\(tokenizer.chat_template: the prompt alone is not a prefix"):
        render_many(rewriting, [good], ["row 1"])
    with pytest.raises(ValueError, match="it has no chat template"):
        render_many(byte_tokenizer(None), [good], ["row 1"])

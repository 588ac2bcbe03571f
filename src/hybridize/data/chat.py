"""From chat messages to token ids, and which of them the assistant wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class Rendered:
    """A tokenised conversation.

    Attributes:
        input_ids: all tokens of the conversation.
        num_prompt_tokens: how many of them come before the last assistant message; the rest is the completion.
    """

    input_ids: list[int]
    num_prompt_tokens: int


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to the point where the assistant is to answer.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    return _apply(tokenizer, messages, add_generation_prompt=True)


def render(tokenizer: Any, messages: Sequence[Message]) -> Rendered:
    """Tokenise a conversation that ends with an assistant message.

    The prompt is what the chat template gives for all messages but the last, with the generation prompt; it works
    for every template, with or without generation markers.

    Raises:
        ValueError: the tokenizer has no chat template, or its template rewrites the prompt once an answer follows.
    """
    prompt = _apply(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = _apply(tokenizer, messages, add_generation_prompt=False)
    return _split(prompt, whole)


def render_many(tokenizer: Any, conversations: Sequence[Sequence[Message]], places: Sequence[str]) -> list[Rendered]:
    """`render` of many conversations, at two calls of the tokenizer, which is faster.

    Args:
        tokenizer: with a chat template.
        conversations: each ends with an assistant message.
        places: where each comes from, for errors.

    Raises:
        ValueError: the tokenizer has no chat template, or it does not take one of them, which is named.
    """
    from jinja2.exceptions import TemplateError

    check_chat_template(tokenizer)
    try:
        prompts = _apply_to_all(tokenizer, [messages[:-1] for messages in conversations], add_generation_prompt=True)
        wholes = _apply_to_all(tokenizer, conversations, add_generation_prompt=False)
        return [_split(prompt, whole) for prompt, whole in zip(prompts, wholes, strict=True)]
    except (ValueError, TemplateError):
        for place, messages in zip(places, conversations, strict=True):
            try:
                render(tokenizer, messages)
            except (ValueError, TemplateError) as error:
                raise ValueError(
                    f"{place}: the tokenizer's chat template does not take it ({error}); change the "
                    "line, or use a tokenizer whose template knows such conversations"
                ) from None
        raise


def _split(prompt: list[int], whole: list[int]) -> Rendered:
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            "tokenizer.chat_template: the prompt alone is not a prefix of prompt plus answer, so the completion "
            "cannot be told apart; use a template whose generation prompt opens the assistant message"
        )
    return Rendered(input_ids=whole, num_prompt_tokens=len(prompt))


def check_chat_template(tokenizer: Any) -> None:
    """Raise a `ValueError` if the tokenizer cannot render chats."""
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(
            f"tokenizer {name}: it has no chat template; set tokenizer.chat_template and save the tokenizer, "
            "or use an instruction-tuned checkpoint"
        )


def _apply(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
    check_chat_template(tokenizer)
    ids = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    return list(ids)


def _apply_to_all(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool
) -> list[list[int]]:
    check_chat_template(tokenizer)
    if not conversations:
        return []
    ids = tokenizer.apply_chat_template(
        [list(messages) for messages in conversations],
        tokenize=True,
        add_generation_prompt=add_generation_prompt,
        return_dict=False,
    )
    return [list(one) for one in ids]

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

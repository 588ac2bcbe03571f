"""Answers sampled so that each is a function of its own random numbers, whatever it is computed together with.

Shapes: B prompts, N new tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class Draw(LogitsProcessor):
    """Samples by the inverse of the distribution function, from one given number per token.

    Args:
        uniform_BN: numbers in [0, 1), float64.
        temperature: of the distribution.
        width: tokens before the first new one.
    """

    def __init__(self, uniform_BN: Tensor, temperature: float, width: int) -> None:
        self.uniform_BN, self.temperature, self.width = uniform_BN, temperature, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave only the token drawn, [B, V]."""
        number_B1 = self.uniform_BN[:, input_ids.shape[1] - self.width, None]
        share_BV = torch.softmax(scores.double() / self.temperature, dim=-1).cumsum(dim=-1)
        token_B1 = torch.searchsorted(share_BV, number_B1 * share_BV[:, -1:], right=True)
        # Rounding must not lead beyond the last token that has a probability: the first to reach the whole.
        token_B1 = torch.minimum(token_B1, share_BV.argmax(dim=-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


@torch.no_grad()
def sample_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    temperature: float,
    end_tokens: Sequence[int],
    pad_token: int,
) -> list[list[int]]:
    """Let a model answer prompts, all at once, padded on the left; nothing but the temperature shapes what it says.

    Args:
        model: a causal language model with `generate`; left in the mode it is in, but run in evaluation mode.
        prompts: token ids.
        keys: a seed for each answer. An answer depends on its prompt and its key, and not on what is answered beside
            it (but for rounding) or was before.
        max_new_tokens: of an answer.
        temperature: of sampling.
        end_tokens: an answer ends with the first of them.
        pad_token: any token; it is masked.

    Returns:
        Token ids of the answers, with the token that ended them if one did.
    """
    width = max(map(len, prompts))
    input_ids = [[pad_token] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    uniform = np.stack([np.random.default_rng(key).random(max_new_tokens) for key in keys])
    device = model.device
    draw = Draw(torch.from_numpy(uniform).to(device), temperature, width)
    was_training = model.training
    model.eval()
    with _plain_generation(model), torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        output = model.generate(
            input_ids=torch.tensor(input_ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            logits_processor=LogitsProcessorList([draw]),
            do_sample=False,  # the draw leaves one token
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_tokens),
            pad_token_id=pad_token,
            use_cache=True,
        )
    model.train(was_training)
    return [_until_end(answer, set(end_tokens)) for answer in output[:, width:].tolist()]


def end_tokens_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's generation config names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in (tokenizer.eos_token_id, *named) if token is not None})


def _until_end(answer: list[int], end_tokens: set[int]) -> list[int]:
    """An answer up to and with the first token that ends it."""
    end = next((i for i, token in enumerate(answer) if token in end_tokens), len(answer))
    return answer[: end + 1]


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Put the model's own habits of generation aside: penalties and the like would bend its distribution."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own

"""Let a model answer token ids, each answer by random numbers of its own.

The uniform numbers are drawn ahead, one per answer and token, from a stream that has the answer's name. So an answer
does not depend on which others share its batch, nor on the device's random numbers; only, as greedy answers do, on the
last bits of the logits, which may differ with the batch's shape.

Shapes: R answers of a batch, N new tokens, T tokens so far, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hybridize.data.growing_cache import make_cache

Key = tuple[int, ...]
"""Names an answer's random numbers; its first number is the seed."""


class Draw(LogitsProcessor):
    """Draws from temperature and nucleus by inverting the distribution function, at one given number per token.

    Without a nucleus, tokens stand in the vocabulary's order, which needs no sorting and which the last bits of the
    logits cannot change.

    Args:
        uniform_RN: a number in [0, 1) for each answer and token, float64, on the logits' device.
        temperature: above 0.
        top_p: tokens are ranked by probability, and those left out whose betters have this much together.
        width: tokens before the first new one.
    """

    def __init__(self, uniform_RN: Tensor, temperature: float, top_p: float = 1.0, width: int = 0) -> None:
        self.uniform_RN, self.temperature, self.top_p, self.width = uniform_RN, temperature, top_p, width

    def __call__(self, input_ids_RT: Tensor, scores_RV: Tensor) -> Tensor:
        """Scores that leave only the token drawn, [R, V]."""
        number_R1 = self.uniform_RN[:, input_ids_RT.shape[1] - self.width, None]
        share_RV = torch.softmax(scores_RV.double() / self.temperature, dim=-1)
        tokens_RV = None
        if self.top_p < 1:
            share_RV, tokens_RV = share_RV.sort(dim=-1, descending=True, stable=True)
            before_RV = share_RV.cumsum(dim=-1) - share_RV
            share_RV = share_RV.where(before_RV < self.top_p, 0.0)
        sum_RV = share_RV.cumsum(dim=-1)
        drawn_R1 = torch.searchsorted(sum_RV, number_R1 * sum_RV[:, -1:], right=True)
        # Rounding must not lead beyond the last token that has a probability: the first to reach the whole.
        drawn_R1 = torch.minimum(drawn_R1, sum_RV.argmax(dim=-1, keepdim=True))
        if tokens_RV is not None:
            drawn_R1 = tokens_RV.gather(1, drawn_R1)
        return torch.full_like(scores_RV, -torch.inf).scatter_(1, drawn_R1, 0.0)


def stream_of(key: Key) -> int:
    """A number of 128 bits that is the seed of an answer's random numbers."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:16], "big")


def draw_uniform(keys: Sequence[Key], num_tokens: int) -> Tensor:
    """Numbers in [0, 1), float64 [R, N]: a row is a function of its key alone, and starts like a longer one."""
    rows = [np.random.Generator(np.random.Philox(stream_of(key))).random(num_tokens) for key in keys]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def sample_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Key],
    *,
    max_new_tokens: int,
    temperature: float,
    end_tokens: Sequence[int],
    pad_token: int,
    top_p: float = 1.0,
) -> list[list[int]]:
    """Let a model answer prompts, all at once, padded on the left; nothing but these arguments shapes what it says.

    Args:
        model: a causal language model with `generate`; left in the mode it is in, but run in evaluation mode. Its own
            generation config (penalties and the like) is put aside meanwhile.
        prompts: token ids.
        keys: a name for each answer's random numbers. An answer depends on its prompt and its key, and not on what is
            answered beside it (but for rounding) or was before.
        max_new_tokens: of an answer.
        temperature: of sampling; 0 is greedy.
        end_tokens: an answer ends with the first of them.
        pad_token: any token; it is masked.
        top_p: nucleus that is sampled from: the likeliest tokens that together have this probability.

    Returns:
        Token ids of the answers, with the token that ended them if one did.
    """
    width = max(map(len, prompts))
    input_ids = [[pad_token] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = model.device
    drawing = {}
    if temperature:
        draw = Draw(draw_uniform(keys, max_new_tokens).to(device), temperature, top_p, width)
        drawing["logits_processor"] = LogitsProcessorList([draw])
    config = getattr(model, "config", None)  # what else can generate makes its own cache
    cache = None if config is None else make_cache(config, width + max_new_tokens)
    caching = {} if cache is None else {"past_key_values": cache}
    with _set_up(model):
        output = model.generate(
            input_ids=torch.tensor(input_ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            do_sample=False,  # a draw leaves one token to choose
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_tokens),
            pad_token_id=pad_token,
            use_cache=True,
            **drawing,
            **caching,
        )
    return [_until_end(answer, set(end_tokens)) for answer in output[:, width:].tolist()]


def end_tokens_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's generation config names; ascending.

    Args:
        model: None, or one that need not have a generation config.
        tokenizer: may have no end token.

    Raises:
        ValueError: there is none.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    tokens = sorted({int(token) for token in (tokenizer.eos_token_id, *named) if token is not None})
    if not tokens:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(f"tokenizer {name}: it has no eos_token, so no answer would ever end; set tokenizer.eos_token")
    return tokens


def _until_end(answer: list[int], end_tokens: set[int]) -> list[int]:
    """An answer up to and with the first token that ends it."""
    end = next((i for i, token in enumerate(answer) if token in end_tokens), len(answer))
    return answer[: end + 1]


@contextmanager
def _set_up(model: Any) -> Iterator[None]:
    """Evaluation mode and no habits of generation, until the end, whatever happens."""
    habits, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = habits
        model.train(was_training)

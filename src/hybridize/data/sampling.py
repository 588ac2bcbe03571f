"""Let a model answer token ids, each answer by random numbers of its own.

The uniform numbers are drawn ahead, one per answer and token, from a stream that has the answer's name. So an answer
does not depend on which others share its batch, nor on the device's random numbers; only, as greedy answers do, on the
last bits of the logits, which may differ with the batch's shape.

`generate` decodes a batch until its last answer ends. Here it is called in rounds, which go on from the same cache, and
between them the answers that have ended leave the batch.

Shapes: R answers of a batch, N new tokens, T tokens so far, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from hybridize.models.growing_cache import make_cache, rows_can_leave

Key = tuple[int, ...]
"""Names an answer's random numbers; its first number is the seed."""

_BEARABLE_WASTE = 0.25  # steps of all rows


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


class Round(StoppingCriteria):
    """Ends answers, and with them a round of `generate` once those that have ended had better leave the batch.

    To leave costs another call of `generate` and moving rows of the cache, to stay costs decoding what nobody reads. A
    round ends when the second has come to what the first is about: a quarter of a step of all rows. So it costs about
    twice, at most, what it would if it were known when answers end.

    Args:
        limits_R: tokens, prompt and padding among them, at which each answer ends if it has not before.
        end_tokens: an answer ends with any of them.
    """

    def __init__(self, limits_R: Tensor, end_tokens: Sequence[int]) -> None:
        self.ended_R = torch.zeros_like(limits_R, dtype=torch.bool)
        self._limits_R = limits_R
        self._end_tokens = torch.tensor(list(end_tokens), dtype=torch.long, device=limits_R.device)
        self._wasted = limits_R.new_zeros(())  # row-steps; it stays on the device, where nobody waits for it

    def __call__(self, input_ids_RT: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Answers that have ended, [R] bool; all of them if the round is over."""
        self.ended_R |= torch.isin(input_ids_RT[:, -1], self._end_tokens) | (self._limits_R <= input_ids_RT.shape[1])
        self._wasted += self.ended_R.sum()
        return self.ended_R | (self._wasted >= _BEARABLE_WASTE * len(self.ended_R))


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
    max_new_tokens: int | Sequence[int],
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
        max_new_tokens: of an answer; one number for all, or one for each.
        temperature: of sampling; 0 is greedy.
        end_tokens: an answer ends with the first of them.
        pad_token: any token; it is masked.
        top_p: nucleus that is sampled from: the likeliest tokens that together have this probability.

    Returns:
        Token ids of the answers, with the token that ended them if one did.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    width, device = max(map(len, prompts)), model.device
    padding = [width - len(prompt) for prompt in prompts]
    tokens = [[pad_token] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    tokens_RT = torch.tensor(tokens, device=device)
    mask_RT = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=device)
    limits_R = torch.tensor(limits, device=device)
    uniform_RN = draw_uniform(keys, max(limits)).to(device) if temperature else None
    config = getattr(model, "config", None)  # what else can generate makes its own cache
    cache = None if config is None else make_cache(config, width + max(limits))
    in_rounds = cache is not None and rows_can_leave(cache) and not _is_sharded(model)
    answers: list[list[int]] = [[]] * len(prompts)
    rows = list(range(len(prompts)))
    with _set_up(model):
        while rows:
            options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
            if uniform_RN is not None:
                options["logits_processor"] = LogitsProcessorList([Draw(uniform_RN, temperature, top_p, width)])
            if in_rounds:
                this_round = Round(width + limits_R, end_tokens)
                options["stopping_criteria"] = StoppingCriteriaList([this_round])
            tokens_RT = model.generate(
                input_ids=tokens_RT,
                attention_mask=mask_RT,
                do_sample=False,  # a draw leaves one token to choose
                max_new_tokens=max(limits[row] for row in rows) + width - tokens_RT.shape[1],
                eos_token_id=list(end_tokens),
                pad_token_id=pad_token,
                use_cache=True,
                **options,
            )
            ended = this_round.ended_R.tolist() if in_rounds else [True] * len(rows)
            for place, row in enumerate(rows):
                if ended[place]:
                    answer = tokens_RT[place, width : width + limits[row]].tolist()
                    answers[row] = _until_end(answer, set(end_tokens))
            places = _close_ranks([place for place in range(len(rows)) if not ended[place]])
            rows = [rows[place] for place in places]
            if rows and cache is not None:
                kept = torch.tensor(places, device=device)
                cache.reorder_cache(kept)
                tokens_RT, mask_RT, limits_R = tokens_RT[kept], mask_RT[kept], limits_R[kept]
                mask_RT = torch.nn.functional.pad(mask_RT, (0, tokens_RT.shape[1] - mask_RT.shape[1]), value=1)
                uniform_RN = None if uniform_RN is None else uniform_RN[kept]
    return answers


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


def _close_ranks(places: list[int]) -> list[int]:
    """Ascending places, in an order that leaves as many as it can where they are: the last ones fill the gaps."""
    staying = {place for place in places if place < len(places)}
    following = iter(places[len(staying) :])
    return [place if place in staying else next(following) for place in range(len(places))]


def _is_sharded(model: Any) -> bool:
    """Whether processes hold parts of the model, so that all must call `generate` equally often."""
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


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

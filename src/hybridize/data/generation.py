"""Let a model answer prompts in batches: greedily or by sampling, with transformers or with vLLM.

The random numbers of an answer have its name: the seed, the prompt's number and the sample's number. So an answer does
not depend on which others share its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hybridize.data.chat import Message, render_prompt
from hybridize.data.sampling import Key, end_tokens_of, sample_answers, stream_of


@dataclass(frozen=True)
class GenerationSettings:
    """How to answer.

    Attributes:
        max_new_tokens: of an answer.
        temperature: of sampling; 0 is greedy.
        top_p: nucleus that is sampled from: the likeliest tokens that together have this probability.
        samples: answers to each prompt.
        seed: of sampling.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.samples < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}, samples {self.samples}: use at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature}, top_p {self.top_p}: use >= 0, and more than 0 up to 1")
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples {self.samples}: greedy answers are all the same; give a temperature, e.g. 0.6")


@dataclass(frozen=True)
class Request:
    """One answer asked for.

    Attributes:
        input_ids: the rendered prompt.
        max_new_tokens: of the answer.
        prompt: number of the prompt, and
        sample: of the answer to it; both name its random numbers.
    """

    input_ids: list[int]
    max_new_tokens: int
    prompt: int
    sample: int = 0


@dataclass(frozen=True)
class Generated:
    """An answer.

    Attributes:
        text: all that the model wrote, special tokens too, but the one that ends it.
        num_tokens: how many tokens that is.
        ended: whether the model ended it, rather than the limit of tokens.
    """

    text: str
    num_tokens: int
    ended: bool


class Engine(Protocol):
    """What generates."""

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """Answer a batch of requests, in their order."""


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    settings: GenerationSettings,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[Generated]]:
    """Answer chats with a model in memory.

    Args:
        model: a causal language model with `generate`.
        tokenizer: its tokenizer, with a chat template.
        prompts: messages up to where the assistant is to answer.
        settings: how.
        batch_size: answers generated at a time.
        on_progress: called with (answered, total) after each batch.

    Returns:
        For each prompt its `settings.samples` answers.

    Raises:
        ValueError: the tokenizer has no chat template, or a prompt leaves no room for an answer.
    """
    rendered = [render_prompt(tokenizer, messages) for messages in prompts]
    requests = make_requests(rendered, settings, max_positions(model))
    answers = answer(TransformersEngine(model, tokenizer, settings), requests, batch_size, on_progress)
    return [answers[i : i + settings.samples] for i in range(0, len(answers), settings.samples)]


def make_requests(
    rendered: Sequence[list[int]],
    settings: GenerationSettings,
    max_length: int | None = None,
    places: Sequence[str] = (),
) -> list[Request]:
    """A request for each sample of each rendered prompt, those of one prompt together.

    Args:
        rendered: token ids of each prompt.
        settings: how many samples, and how long at most.
        max_length: tokens that the model can hold, prompt and answer; the answer's limit is lowered to fit.
        places: where the prompts come from, for errors.

    Raises:
        ValueError: a prompt leaves no room for an answer.
    """
    requests = []
    for number, ids in enumerate(rendered):
        room = settings.max_new_tokens if max_length is None else min(settings.max_new_tokens, max_length - len(ids))
        if room < 1:
            place = places[number] if places else f"prompt {number}"
            raise ValueError(
                f"{place}: it has {len(ids)} tokens, but the model holds {max_length} (max_position_embeddings); "
                "leave it out or shorten it"
            )
        requests += [Request(ids, room, number, sample) for sample in range(settings.samples)]
    return requests


def max_positions(model: Any) -> int | None:
    """Tokens that a model can hold, if its config says so."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def cut_batches(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Numbers of requests in batches of similar length, so that little is padded and little is waited for."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: use at least 1")
    order = sorted(range(len(requests)), key=lambda i: (requests[i].max_new_tokens, len(requests[i].input_ids), i))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


def answer(
    engine: Engine,
    requests: Sequence[Request],
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Answer requests in batches of similar length; in the order of `requests`."""
    answers: dict[int, Generated] = {}
    for batch in cut_batches(requests, batch_size):
        answers.update(zip(batch, engine.generate([requests[i] for i in batch]), strict=True))
        if on_progress:
            on_progress(len(answers), len(requests))
    return [answers[i] for i in range(len(requests))]


class TransformersEngine:
    """Generates with a model in memory, by its own `generate`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        settings: temperature, top_p and seed; what else they say is in the requests.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: GenerationSettings) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._end_tokens = end_tokens_of(model, tokenizer)

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """Answer a batch, left-padded; an answer that ends, or comes to its own limit, leaves it."""
        pad = self._tokenizer.pad_token_id
        with torch.inference_mode():
            replies = sample_answers(
                self._model,
                [request.input_ids for request in requests],
                [_key(self._settings.seed, request) for request in requests],
                max_new_tokens=[request.max_new_tokens for request in requests],
                temperature=self._settings.temperature,
                top_p=self._settings.top_p,
                end_tokens=self._end_tokens,
                pad_token=self._end_tokens[0] if pad is None else pad,
            )
        return [self._finish(reply) for reply in replies]

    def _finish(self, reply: list[int]) -> Generated:
        ended = reply[-1] in self._end_tokens
        return _generated(self._tokenizer, reply[:-1] if ended else reply, ended)


class VllmEngine:
    """Generates with vLLM, which loads the model itself.

    Each answer has a seed of its own, made of the settings' seed and the prompt's and sample's numbers. vLLM's kernels
    do not promise the same last bits in every batch, so a repeated run may differ in a few answers.

    Args:
        model: path or name of the model.
        tokenizer: its tokenizer.
        settings: temperature, top_p and seed; what else they say is in the requests.
        max_length: tokens of the longest prompt with its answer; memory is set aside for so many.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(self, model: str, tokenizer: Any, settings: GenerationSettings, max_length: int) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                f"engine vllm: it cannot be imported ({error}); pip install 'hybridize[serve]', "
                "or use engine transformers"
            ) from error
        self._tokenizer = tokenizer
        self._settings = settings
        self._end_tokens = end_tokens_of(None, tokenizer)  # vLLM itself adds those of the model's generation config
        self._sampling_params = vllm.SamplingParams
        self._llm = vllm.LLM(model=model, max_model_len=max_length)

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """Answer a batch."""
        params = [
            self._sampling_params(
                n=1,
                temperature=self._settings.temperature,
                top_p=self._settings.top_p,
                max_tokens=request.max_new_tokens,
                seed=stream_of(_key(self._settings.seed, request)) % 2**63,
                stop_token_ids=self._end_tokens,
                detokenize=False,  # done here, as for the other engine
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.input_ids} for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [self._finish(output.outputs[0]) for output in outputs]

    def _finish(self, completion: Any) -> Generated:
        ids, ended = list(completion.token_ids), completion.finish_reason == "stop"
        return _generated(self._tokenizer, ids[:-1] if ended else ids, ended)  # the last one is what ended it


def _generated(tokenizer: Any, ids: list[int], ended: bool) -> Generated:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Generated(text, len(ids), ended)


def _key(seed: int, request: Request) -> Key:
    return seed, request.prompt, request.sample

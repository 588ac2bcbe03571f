"""The models that lm-evaluation-harness asks: its own two backends, their thinking cut off, their progress told.

Imports lm-evaluation-harness, so it is imported by `run` only when that is there.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from hybridize.data.verify import THINKING_MARKS, THINKING_OPENS, final_answer

_METHODS = ("generate_until", "loglikelihood", "loglikelihood_rolling")


def load_lm(path: str, backend: str, batch_size: int) -> Any:
    """A model for lm-evaluation-harness.

    Args:
        path: of a checkpoint, hybrid or not, with its tokenizer.
        backend: `hf` or `vllm`.
        batch_size: requests at a time; for vLLM the most that run at once.

    Raises:
        ImportError: the backend is `vllm`, and vLLM is not installed.
    """
    if backend == "vllm":
        if find_spec("vllm") is None:
            raise ImportError("backend vllm: vllm is not installed; pip install 'hybridize[serve]', or use backend hf")
        # `auto` gives vLLM all requests, of which it runs so many at once; a number would make it wait for each batch.
        return get_model("vllm")(pretrained=path, batch_size="auto", max_batch_size=batch_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformersLM(pretrained=path, backend="causal", device=device, batch_size=batch_size)


class TransformersLM(HFLM):
    """The `hf` backend, but that the marks around thinking stay in a reply even where they are special tokens.

    Otherwise a model whose tokenizer calls them special would seem to answer with all of its thinking.
    """

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """Text without special tokens other than the marks around thinking."""
        if not skip_special_tokens or isinstance(tokens, int):
            return super().tok_decode(tokens, skip_special_tokens)
        dropped = {
            number
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in THINKING_MARKS
        }
        return super().tok_decode([token for token in tokens if token not in dropped], skip_special_tokens=False)


class Watched:
    """A model that answers without its thinking, shows no bars of its own and says how far it is.

    Everything else is the model's own.

    Args:
        lm: a model of lm-evaluation-harness whose request methods take `disable_tqdm`.
        tasks: what it will be asked, whose requests are counted once they are built.
        on_progress: called with (answered, all) requests.

    Attributes:
        unfinished: by task, how many replies ended before their thinking did.
    """

    def __init__(
        self, lm: Any, tasks: Sequence[Any] = (), on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.unfinished: Counter[str] = Counter()
        self._lm = lm
        self._tasks = tasks
        self._on_progress = on_progress
        self._answered = 0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._lm, name)
        if name not in _METHODS:
            return attribute

        def ask(requests: list[Instance]) -> list[Any]:
            before = self._answered
            self._lm.set_cache_hook(_Ticks(self._tick))
            try:
                replies = attribute(requests, disable_tqdm=True)
            finally:
                self._lm.set_cache_hook(CacheHook(None))
            self._tick(before + len(requests) - self._answered)  # not every model tells each
            return list(self._finals(requests, replies)) if name == "generate_until" else replies

        return ask

    def _finals(self, requests: list[Instance], replies: list[str]) -> Iterator[str]:
        for request, reply in zip(requests, replies, strict=True):
            # Some chat templates open the thinking, so that the reply begins within it.
            opened = next((mark for mark in THINKING_OPENS if request.args[0].rstrip().endswith(mark)), "")
            whole = opened + reply
            final = final_answer(whole)
            if final is None:
                self.unfinished[str(request.task_name)] += 1
                yield ""
            else:
                yield final.lstrip() if final != whole else final

    def _tick(self, number: int = 1) -> None:
        self._answered += number
        if self._on_progress is not None and number:
            total = sum(request.repeats or 1 for task in self._tasks for request in task.instances or ())
            self._on_progress(self._answered, max(total, self._answered))


class _Ticks(CacheHook):
    """Called by a model after each answer, to keep it; here, to count it."""

    def __init__(self, tick: Callable[[], None]) -> None:
        super().__init__(None)
        self._told = tick

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One more."""
        self._told()

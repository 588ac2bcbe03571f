"""Is an answer right? The world's judge, math-verify, a user's own function, or no question asked."""

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridize.data.generation import Generated
from hybridize.data.sources import Prompt
from hybridize.data.verify_math import MathJudge
from hybridize.data.world import judge

THINKING_OPENS = ("<think>", "Here are my reasoning steps:")
"""What opens thinking, in a reply or at the end of a prompt; the second is Apriel's."""

_THOUGHT, _BEGIN, _END = "</think>", "[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"
THINKING_MARKS = ("<think>", _THOUGHT, _BEGIN, _END)
"""Marks around thinking and answers; in some tokenizers they are special tokens."""

_BUILT_IN = ("auto", "world", "math", "none")
_LATEX = re.compile(r"\\boxed|(?<!\\)\$|\\[(\[]")  # how LaTeX is marked in text


@dataclass(frozen=True)
class Verifier:
    """Tells right answers from wrong ones.

    Attributes:
        name: `world`, `math`, `none` or `file.py:function`, for a trace's provenance.
        accept: (prompt, reply) -> whether it is right.
        keeps_truncated: whether an answer that the limit of tokens cut may be right.
        close: gives back what it holds.
    """

    name: str
    accept: Callable[[Prompt, str], bool]
    keeps_truncated: bool = False
    close: Callable[[], None] = lambda: None

    def __call__(self, prompt: Prompt, generated: Generated) -> bool:
        """Whether an answer is right. One without a word is not, and one that was cut is not either but for `none`."""
        if not generated.text.strip() or not (generated.ended or self.keeps_truncated):
            return False
        return self.accept(prompt, generated.text)


def load_verifier(name: str, prompts: Sequence[Prompt]) -> Verifier:
    """The verifier of that name, after a look at whether the prompts hold what it needs.

    Args:
        name: `world`: right answer by right steps, as the reasoning world judges. `math`: math-verify finds the final
            answer, behind the thinking, equal to the reference. `none`: all are right. `file.py:function`: what a
            function of (prompt, answer, reference) says, being the text of the last message, the reply with its
            thinking, and the row's answer or None. `auto`: `world` for problems of the world, `math` for others.
        prompts: what will be answered.

    Raises:
        ValueError: the name is none of these, the function cannot be loaded, or a prompt lacks what the verifier needs.
        ImportError: math-verify is not installed.
    """
    if name == "auto":
        name = "world" if all(prompt.problem is not None for prompt in prompts) else "math"
    if name == "none":
        return Verifier(name, lambda prompt, reply: True, keeps_truncated=True)
    if name == "world":
        for prompt in prompts:
            if prompt.problem is None:
                raise ValueError(
                    f"verifier world: {prompt.place} is no problem of the reasoning world; use math, none or a function"
                )
        return Verifier(name, _judge)
    if name == "math":
        for prompt in prompts:
            if prompt.answer is None:
                raise ValueError(
                    f"verifier math: {prompt.place} has no answer to compare with; add a column answer, or use "
                    "verifier none or a function"
                )
        judge_math = MathJudge()
        return Verifier(name, lambda prompt, reply: _verify_math(judge_math, prompt, reply), close=judge_math.close)
    path, colon, function = name.rpartition(":")
    if not colon or not path:
        raise ValueError(f"verifier: {name!r} is unknown; use one of {', '.join(_BUILT_IN)}, or file.py:function")
    return _load_function(Path(path), function)


def final_answer(reply: str) -> str | None:
    """What a reply says after its thinking; None if the thinking never ends.

    Thinking stands between `<think>` and `</think>`, or, as Apriel does it, between `Here are my reasoning steps:` and
    `[BEGIN FINAL RESPONSE]`, whose answer goes to `[END FINAL RESPONSE]` or to the reply's end. Chat templates that
    open the thinking in the prompt leave only what closes it in the reply.
    """
    open_think, open_steps = THINKING_OPENS
    _, closed, final = reply.rpartition(_THOUGHT)
    if not closed and open_think in final:
        return None
    _, closed, answer = final.rpartition(_BEGIN)
    if closed:
        return answer.partition(_END)[0].strip()  # the marks stand on lines of their own
    return None if final.lstrip().startswith(open_steps) else final


def _judge(prompt: Prompt, reply: str) -> bool:
    assert prompt.problem is not None
    return judge(prompt.problem, reply).correct


def _verify_math(judge_math: MathJudge, prompt: Prompt, reply: str) -> bool:
    final = final_answer(reply)
    assert prompt.answer is not None
    return final is not None and judge_math(_reference(prompt.answer), final)


def _reference(answer: str) -> str:
    """A reference as math-verify finds it: what stands behind #### where there is that, as LaTeX unless it says so."""
    answer = answer.rpartition("####")[2].strip()
    return answer if _LATEX.search(answer) else f"${answer}$"


def _load_function(path: Path, name: str) -> Verifier:
    place = f"verifier {path}:{name}"
    if not path.is_file():
        raise ValueError(f"{place}: there is no file {path}; check the path")
    spec = importlib.util.spec_from_file_location(f"hybridize_verifier_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{place}: {path} is no Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file may raise
        raise ValueError(f"{place}: {path} does not load ({_say(error)}); mend it") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place}: {path} has no function {name!r}; use one of {', '.join(found) or 'none'}")

    def accept(prompt: Prompt, reply: str) -> bool:
        try:
            verdict: Any = function(prompt.text, reply, prompt.answer)
        except Exception as error:  # whatever a user's function may raise
            raise ValueError(f"{place}: it failed at {prompt.place} ({_say(error)}); mend it") from error
        if not isinstance(verdict, bool | np.bool_):
            raise ValueError(f"{place}: at {prompt.place} it returned {verdict!r}; return True or False")
        return bool(verdict)

    return Verifier(f"{path}:{name}", accept)


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

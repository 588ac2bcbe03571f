"""Let a model answer problems of the reasoning world in batches, and judge every step it writes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybridize.data.chat import render, render_prompt
from hybridize.data.world import Problem, Verdict, judge
from hybridize.evaluation.score import Score


@dataclass(frozen=True)
class Attempt:
    """One problem, what the model wrote, and the judge's word on it."""

    problem: Problem
    reply: str
    verdict: Verdict
    num_tokens: int


def evaluate_problems(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Answer problems greedily and count right answers per task.

    Args:
        model: a causal language model with `generate`.
        tokenizer: its tokenizer, with a chat template.
        problems: what to answer; at least one.
        batch_size: problems answered at a time.
        on_progress: called with (answered, total) after each batch.

    Returns:
        The summary of `summarise`, with `seconds` and `num_tokens` generated.

    Raises:
        ValueError: no problems, or no chat template.
    """
    if not problems:
        raise ValueError("problems: none were given; ask for at least one")
    started = time.perf_counter()
    attempts = generate_replies(model, tokenizer, problems, batch_size, on_progress)
    summary = summarise(attempts)
    return summary | {
        "num_tokens": sum(attempt.num_tokens for attempt in attempts),
        "seconds": time.perf_counter() - started,
    }


@torch.inference_mode()
def generate_replies(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Attempt]:
    """Greedy answers in batches of similar length, left-padded; in the order of `problems`.

    A reply may be half as long again as the gold one, plus 16 tokens; what runs on is cut there.
    """
    was_training = model.training
    model.eval()
    prompts = [render_prompt(tokenizer, problem.messages[:1]) for problem in problems]
    budgets = []
    for problem in problems:
        gold = render(tokenizer, problem.messages)
        budgets.append(3 * (len(gold.input_ids) - gold.num_prompt_tokens) // 2 + 16)
    order = sorted(range(len(problems)), key=lambda i: (budgets[i], len(prompts[i])))
    attempts: dict[int, Attempt] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        replies = _generate(model, tokenizer, [prompts[i] for i in batch], max(budgets[i] for i in batch))
        for index, ids in zip(batch, replies, strict=True):
            ids = ids[: budgets[index]]
            reply = tokenizer.decode(ids, skip_special_tokens=True)
            verdict = judge(problems[index], reply)
            attempts[index] = Attempt(problems[index], reply, verdict, len(ids))
        if on_progress:
            on_progress(len(attempts), len(problems))
    model.train(was_training)
    return [attempts[i] for i in range(len(problems))]


def summarise(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Scores overall and per task: right answers, and right answers by right steps."""

    def score(chosen: Sequence[Attempt]) -> dict[str, Any]:
        answers = Score(sum(attempt.verdict.answer_correct for attempt in chosen), len(chosen))
        steps = Score(sum(attempt.verdict.correct for attempt in chosen), len(chosen))
        return answers.as_dict() | {"steps_correct": steps.correct}

    tasks = sorted({attempt.problem.task for attempt in attempts})
    return {
        "overall": score(attempts),
        "tasks": {task: score([a for a in attempts if a.problem.task == task]) for task in tasks},
    }


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    replies = output[:, width:].tolist()
    stop = tokenizer.eos_token_id
    return [reply[: reply.index(stop)] if stop in reply else reply for reply in replies]

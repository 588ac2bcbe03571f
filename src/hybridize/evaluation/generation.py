"""Let a model answer problems of the reasoning world in batches, and judge every step it writes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.data.chat import render_many
from hybridize.data.generation import GenerationSettings, Request, TransformersEngine, answer
from hybridize.data.world import Problem, Verdict, judge
from hybridize.evaluation.score import PassAtK, Score


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
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Answer problems and count right answers per task.

    Args:
        model: a causal language model with `generate`.
        tokenizer: its tokenizer, with a chat template.
        problems: what to answer; at least one.
        batch_size: answers generated at a time.
        on_progress: called with (answered, total) after each batch.
        samples: answers to each problem; above 1 they are sampled, and pass@k is reported.
        temperature: of sampling; 0 is greedy.
        seed: of sampling, and of the bootstrap.

    Returns:
        The summary of `summarise`, with `seconds` and `num_tokens` generated.

    Raises:
        ValueError: no problems, several samples without a temperature, or no chat template.
    """
    if not problems:
        raise ValueError("problems: none were given; ask for at least one")
    started = time.perf_counter()
    attempts = generate_replies(model, tokenizer, problems, batch_size, on_progress, samples, temperature, seed)
    summary = summarise(attempts, samples, seed)
    return summary | {
        "num_tokens": sum(attempt.num_tokens for attempt in attempts),
        "seconds": time.perf_counter() - started,
    }


def generate_replies(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Attempt]:
    """Answers in batches of similar length; in the order of `problems`, the samples of one problem together.

    A reply may be half as long again as the gold one, plus 16 tokens; what runs on is cut there. Arguments are those of
    `evaluate_problems`.
    """
    requests, longest = [], 1
    places = [f"{problem.task} level {problem.level}" for problem in problems]
    golds = render_many(tokenizer, [problem.messages for problem in problems], places)
    for number, gold in enumerate(golds):
        budget = 3 * (len(gold.input_ids) - gold.num_prompt_tokens) // 2 + 16
        longest = max(longest, budget)
        prompt = gold.input_ids[: gold.num_prompt_tokens]
        requests += [Request(prompt, budget, number, sample) for sample in range(samples)]
    settings = GenerationSettings(longest, temperature, samples=samples, seed=seed)
    answers = answer(TransformersEngine(model, tokenizer, settings), requests, batch_size, on_progress)
    attempts = []
    for request, generated in zip(requests, answers, strict=True):
        problem = problems[request.prompt]
        verdict = judge(problem, generated.text)
        attempts.append(Attempt(problem, generated.text, verdict, generated.num_tokens))
    return attempts


def summarise(attempts: Sequence[Attempt], samples: int = 1, seed: int = 0) -> dict[str, Any]:
    """Scores overall and per task: right answers, and right answers by right steps.

    Args:
        attempts: those of one problem together.
        samples: how many that is.
        seed: of the bootstrap.

    Returns:
        `overall` and `tasks`, by name: `correct`, `total`, `accuracy`, `low`, `high` (the 95% interval) and
        `steps_correct`. With several samples, `correct` and `total` count attempts; since those on one problem are not
        independent of one another, the interval is the bootstrap's over problems; and each of these, and the whole, has
        `pass_at`: by k, 1 and `samples`, the share of problems that k samples solve as `accuracy`, `low`, `high`.
    """

    def score(chosen: Sequence[Attempt]) -> dict[str, Any]:
        answers = Score(sum(attempt.verdict.answer_correct for attempt in chosen), len(chosen))
        summary = answers.as_dict() | {"steps_correct": sum(attempt.verdict.correct for attempt in chosen)}
        if samples == 1:
            return summary
        right = [
            sum(attempt.verdict.answer_correct for attempt in chosen[i : i + samples])
            for i in range(0, len(chosen), samples)
        ]
        pass_at = {str(k): PassAtK(tuple(right), samples, k, seed).as_dict() for k in (1, samples)}
        return summary | {"low": pass_at["1"]["low"], "high": pass_at["1"]["high"], "pass_at": pass_at}

    tasks = sorted({attempt.problem.task for attempt in attempts})
    overall = score(attempts)
    summary = {
        "overall": overall,
        "tasks": {task: score([a for a in attempts if a.problem.task == task]) for task in tasks},
    }
    return summary | ({"pass_at": overall["pass_at"]} if samples > 1 else {})

"""Distillation on the student's own answers: what it will see when it generates, it is corrected on.

Each step the student answers prompts; then student and teacher read prompts and answers, and the divergence of their
next-token distributions is taken at the student's tokens. Gradients go through the student's distributions given the
tokens, not through the sampling of them: on-policy GKD (arXiv 2306.13649), with the reverse KL that MiniLLM (arXiv
2306.08543) argues for.

TRL's DistillationTrainer does the same and is not used: it samples from the process's own generator, so that an answer
depends on all that was drawn before it and on how prompts are dealt to processes; it has one temperature for sampling
and loss; it changes the model's config; and on a CPU it computes the loss at prompts and padding too. The loop here is
the same Trainer's, generation is transformers', the loss is the one of `distill`; a test holds it against TRL's.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hybridize.data.chat import Message, render_prompt
from hybridize.data.packing import PAD_TOKEN, PackedRows
from hybridize.data.sampling import end_tokens_of, sample_answers
from hybridize.spec.stages import OnPolicyStage
from hybridize.training.core import OnLog, Run
from hybridize.training.metrics import MetricsFile
from hybridize.training.run import TrainResult, carry_out, identity_of
from hybridize.training.trainer import DistillTrainer


class OnPolicyTrainer(DistillTrainer):
    """Trains a student to follow a teacher on the answers that the student gives.

    Args:
        student: the model to train.
        teacher: frozen, in evaluation mode, on the training device.
        stage: all settings.
        prompts: token ids, in the order they are answered in, over and over.
        end_tokens: an answer ends with the first of them.
        **run: see `Run`.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        stage: OnPolicyStage,
        prompts: Sequence[Sequence[int]],
        end_tokens: Sequence[int],
        **run: Any,
    ) -> None:
        turns = _Turns(stage.steps * stage.prompts_per_step)
        super().__init__(student, teacher, stage, train_dataset=turns, data_collator=_collate_turns, **run)
        self.prompts, self.end_tokens, self.seed = prompts, end_tokens, stage.seed
        self.max_new_tokens, self.generation_temperature = stage.max_new_tokens, stage.generation_temperature
        last = self.metrics.records[-1] if self.metrics.records else {"tokens": 0, "loss_tokens": 0}
        self.tokens_seen = last["tokens"], last["loss_tokens"]
        self.share_ended = 0.0

    def prepare(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Let the student answer all prompts of a step that are this process's, and make batches of them."""
        turns = [batch["turn"].tolist() for batch in batches]
        asked = [turn for batch in turns for turn in batch]
        prompts = {turn: self.prompts[turn % len(self.prompts)] for turn in asked}
        device = self.args.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            answers = sample_answers(
                self.accelerator.unwrap_model(self.model),
                [prompts[turn] for turn in asked],
                [(self.seed, turn) for turn in asked],
                max_new_tokens=self.max_new_tokens,
                temperature=self.generation_temperature,
                end_tokens=self.end_tokens,
                pad_token=PAD_TOKEN,
            )
        answer_of = dict(zip(asked, answers, strict=True))
        self._count(prompts, answer_of)
        made = []
        for batch in turns:
            rows = answered_rows([prompts[turn] for turn in batch], [answer_of[turn] for turn in batch])
            made.append(rows.collate([rows[i] for i in range(len(rows))]))
        return made

    def seen(self, step: int) -> tuple[int, int]:
        """Tokens of prompts and answers so far, and those of answers."""
        return self.tokens_seen

    def details(self) -> dict[str, Any]:
        """The share of the step's answers that came to an end by themselves."""
        return {"share_ended": self.share_ended}

    def _count(self, prompts: dict[int, Sequence[int]], answers: dict[int, list[int]]) -> None:
        num_answer_tokens = sum(map(len, answers.values()))
        num_tokens = sum(map(len, prompts.values())) + num_answer_tokens
        num_ended = sum(answer[-1] in self.end_tokens for answer in answers.values())
        counts = torch.tensor([num_tokens, num_answer_tokens, num_ended, len(answers)], device=self.args.device)
        num_tokens, num_answer_tokens, num_ended, num_answers = self.over_processes(counts).tolist()
        self.tokens_seen = self.tokens_seen[0] + num_tokens, self.tokens_seen[1] + num_answer_tokens
        self.share_ended = num_ended / num_answers


def distill_on_policy(
    student: Any,
    teacher: Any,
    prompts: Sequence[Sequence[Message]],
    tokenizer: Any,
    stage: OnPolicyStage,
    out_dir: str | Path,
    *,
    on_log: OnLog | None = None,
) -> TrainResult:
    """Train a student, in place, to follow a teacher's next-token distributions on the student's own answers.

    An answer ends with the tokenizer's end token or one of the student's generation config; nothing after it counts.
    The token that ends it does. Each step's loss is the mean divergence over all tokens of its answers, however they
    are cut into batches. What is sampled is a function of the weights, the seed and the number of the answer, so that
    the run resumes like `distill`, with the same bits on a CPU. Of the student's generation config, only the end
    tokens are used: answers come from the student's whole distribution at `stage.generation_temperature`.

    All answers of a step are generated at once (on each process, its share of them), so the cache of
    `prompts_per_step` sequences must fit; `rows_per_batch` of them are computed at a time after that.

    Args:
        student: a causal language model with `generate`. Its parameters become fp32; it is left in evaluation mode,
            on the training device. When resuming, its weights are replaced by the checkpoint's.
        teacher: another, of the same vocabulary. Moved to the training device, run in its own dtype, in evaluation
            mode; its weights do not change.
        prompts: chats up to the point where the assistant is to answer. Taken in their order, and from the start
            again when there are no more.
        tokenizer: with a chat template.
        stage: all settings; `tokens_per_step` and `sequence_length` are not used.
        out_dir: gets `metrics.jsonl`, a line per step, and `checkpoints/`, the last two.
        on_log: called after each step with its record and the number of all steps. As for `distill`; `tokens` counts
            prompts and answers, `loss_tokens` answers; `share_ended` is the share of answers that were not cut off.

    Raises:
        ValueError: there are no prompts, no end token or no chat template; the freezing or the existing checkpoints
            do not go with the stage.
        DivergedError: loss, gradients or weights are no longer finite.
    """
    if not prompts:
        raise ValueError("prompts: there are none to answer; give at least one")
    end_tokens = end_tokens_of(student, tokenizer)
    ids = [render_prompt(tokenizer, messages) for messages in prompts]
    digest = hashlib.sha256(json.dumps([ids, end_tokens]).encode()).hexdigest()
    identity = identity_of(stage, "tokens_per_step", "sequence_length", prompts=digest)

    def make(args: Any, metrics: MetricsFile) -> Run:
        return OnPolicyTrainer(
            student,
            teacher,
            stage,
            ids,
            end_tokens,
            metrics=metrics,
            identity=identity,
            on_log=on_log,
            args=args,
        )

    return carry_out(
        student, stage, Path(out_dir), identity, make, num_rows_per_step=stage.prompts_per_step, teacher=teacher
    )


def answered_rows(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> PackedRows:
    """Rows of one document each, a prompt and its answer, as long as the longest."""
    documents = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    sizes = np.array([len(document) for document in documents])
    offsets = np.concatenate([[0], sizes.cumsum()])
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
    return PackedRows(
        np.concatenate(documents).astype(np.int32),
        positions.astype(np.int32),
        positions >= np.repeat([len(prompt) for prompt in prompts], sizes),
        offsets.astype(np.int64),
        int(sizes.max()),
    )


class _Turns(Dataset):
    """The numbers of all answers to be given."""

    def __init__(self, num_turns: int) -> None:
        self.num_turns = num_turns

    def __len__(self) -> int:
        return self.num_turns

    def __getitem__(self, index: int) -> int:
        return index


def _collate_turns(turns: Sequence[int]) -> dict[str, Tensor]:
    return {"turn": torch.tensor(turns)}

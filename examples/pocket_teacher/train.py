"""Train the pocket teacher from scratch: a 16-layer Mistral of 9.7M parameters that reasons in the small world.

    python examples/pocket_teacher/train.py --out pocket --compile

6500 steps of 65,536 tokens, 426M in all: about seven minutes on one H100 at 1.06M tokens/s. The model and its
tokenizer are then in `pocket/teacher`. Killed and called again with the same arguments it goes on from its last
checkpoint. A batch is a pure function of its number and the number of steps, so neither a restart nor the number of
data workers changes what is trained on.
"""

import argparse
import time
from pathlib import Path
from random import Random

import torch
from tokenizer import train_tokenizer
from torch.utils.data import Dataset
from transformers import MistralConfig, MistralForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from hybridize.data.chat import render
from hybridize.data.world import MAX_LEVEL, TASKS, draw_problem

TASK_WEIGHT = {"quantities": 2.0, "addition": 0.3, "swaps": 1.5, "recall": 1.5}
LEVEL_WEIGHT = {1: 1.0, 2: 1.2, 3: 1.4, 4: 1.4, 5: 1.0, 6: 0.7, 7: 0.4, 8: 0.2}
"""Share of the trained tokens (not of the problems)."""

BUCKETS = (80, 104, 128, 160, 208, 256, 336, 448, 640, 960, 1680)
"""Upper ends of the length classes; a batch holds problems of one class, so that little of it is padding."""

WARM_SHARE = 0.15
"""Over this first share of the steps only levels 1 to 3 are seen: short problems form the heads that look things
up, on which all the rest is built."""
WARM_LEVEL = 3


class Batches(Dataset):
    """Ready-made batches of about `tokens` tokens, right-padded, never packed; labels on the completion only."""

    def __init__(self, tokenizer, tokens: int, length: int):
        self.tokenizer, self.tokens, self.length = tokenizer, tokens, length
        self.easy, self.full = self._classes(WARM_LEVEL), self._classes(MAX_LEVEL)

    def _classes(self, max_level: int) -> list[tuple[int, list[tuple[str, int]]]]:
        """Cells (task, level) by length class."""
        classes: dict[int, list[tuple[str, int]]] = {}
        for task in TASKS:
            for level in range(1, max_level + 1):
                size = max(len(self._render(task, level, i)[0]) for i in range(8))
                classes.setdefault(next(end for end in BUCKETS if size <= end), []).append((task, level))
        return sorted(classes.items())

    def __len__(self) -> int:
        return self.length

    def _render(self, task: str, level: int, index: int) -> tuple[list[int], int]:
        rendered = render(self.tokenizer, draw_problem(task, level, "train", index).messages)
        return rendered.input_ids, rendered.num_prompt_tokens

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = Random(f"batch/{index}")
        classes = self.easy if index < WARM_SHARE * self.length else self.full
        end, cells = rng.choices(classes, [sum(map(_weight, cells)) for _, cells in classes])[0]
        per_problem = [_weight(cell) for cell in cells]
        rows = []
        for _ in range(max(1, self.tokens // end)):
            task, level = rng.choices(cells, per_problem)[0]
            rows.append(self._render(task, level, rng.randrange(2**40)))
        width = -(-max(len(ids) for ids, _ in rows) // 16) * 16
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        for row, (ids, num_prompt) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
        return {"input_ids": input_ids, "labels": labels}


def _weight(cell: tuple[str, int]) -> float:
    return TASK_WEIGHT[cell[0]] * LEVEL_WEIGHT[cell[1]]


class Pace(TrainerCallback):
    """Print loss and tokens per second as training goes."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step, self.started, self.first = tokens_per_step, 0.0, 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by the Trainer with each new record."""
        if not self.started:
            self.started, self.first = time.perf_counter(), state.global_step
        elif logs and "loss" in logs:
            done = state.global_step - self.first
            rate = done * self.tokens_per_step / (time.perf_counter() - self.started)
            loss, rate_of_learning = float(logs["loss"]), float(logs["learning_rate"])
            print(
                f"step {state.global_step}  loss {loss:.4f}  lr {rate_of_learning:.2e}  {rate / 1e3:.1f}k tokens/s",
                flush=True,
            )


class StopAfter(TrainerCallback):
    """Write a checkpoint and stop once the time is up."""

    def __init__(self, minutes: float):
        self.until = time.perf_counter() + 60 * minutes

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer after each step."""
        if time.perf_counter() >= self.until:
            control.should_save = control.should_training_stop = True


def build_model(tokenizer) -> MistralForCausalLM:
    """The pocket teacher's architecture, random weights."""
    config = MistralConfig(
        vocab_size=576,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return MistralForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--minutes", type=float, help="stop after this long, with a checkpoint")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a step, padding included")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=400, help="steps of learning-rate warm-up")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers (pays on a GPU)")
    args = parser.parse_args()

    set_seed(0)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, vocabulary {len(tokenizer)}", flush=True)
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    on_gpu = torch.cuda.is_available()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out / "checkpoints"),
            max_steps=args.steps,
            per_device_train_batch_size=1,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.warmup,
            weight_decay=0.1,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch",
            bf16=on_gpu,
            tf32=on_gpu,
            logging_steps=100,
            save_steps=args.save_every,
            save_total_limit=1,
            dataloader_num_workers=args.workers,
            dataloader_pin_memory=on_gpu,
            dataloader_prefetch_factor=8 if args.workers else None,
            report_to=[],
            disable_tqdm=True,
            seed=0,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Batches(tokenizer, args.tokens, args.steps),
        data_collator=lambda rows: rows[0],
        callbacks=[Pace(args.tokens)],
    )
    if args.minutes:
        trainer.add_callback(StopAfter(args.minutes))
    resumable = any((args.out / "checkpoints").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resumable)
    save(model, tokenizer, args.out / "teacher")


def save(model, tokenizer, out: Path) -> None:
    """Write the model in bf16 with its tokenizer."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.config.use_cache = True
    model.generation_config.use_cache = True
    model.save_pretrained(out, state_dict=state)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()

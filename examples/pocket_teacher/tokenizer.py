"""The pocket teacher's tokenizer: a small byte-level BPE trained on the reasoning world alone."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hybridize.data.world import MAX_LEVEL, TASKS, draw_problem

SPECIAL_TOKENS = ["<pad>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"]

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<|user|>' + message.content + '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}
{{- message.content + '<|end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- raise_exception('role ' + message.role + ' is unknown; use user or assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

# A word or a digit takes the space before it along; every digit is a token of its own.
PIECES = Regex(r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]+|\s+")


def train_tokenizer(vocab_size: int = 576, problems_per_cell: int = 200) -> PreTrainedTokenizerFast:
    """Train the tokenizer on problems of every task and level (training split)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(problems_per_cell), trainer)
    # Not special, so that decoding keeps them: a judge reads the thinking between them.
    bpe.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(problems_per_cell: int):
    for task in TASKS:
        for level in range(1, MAX_LEVEL + 1):
            for index in range(problems_per_cell // level):
                problem = draw_problem(task, level, "train", index)
                yield problem.question
                yield problem.thinking + "\n"
                yield problem.answer


if __name__ == "__main__":
    train_tokenizer().save_pretrained(Path(__file__).parents[2] / "models" / "pocket-teacher")

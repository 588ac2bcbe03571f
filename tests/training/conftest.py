"""Tiny teachers and hybrids, packed rows of made-up documents, and a run of each kind over them."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hybridize.data.packing import PackedRows
from hybridize.spec import LayoutSpec, Mamba1Spec
from hybridize.spec.stages import DistillStage, FitStage, OnPolicyStage, SftStage
from hybridize.training import distill, distill_on_policy, finetune, fit, read_metrics
from hybridize.transfer import convert

VOCABULARY = 61
LENGTH = 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build_teacher(family="llama"):
    torch.manual_seed(0)
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES | {"sliding_window": 6})).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"tie_word_embeddings": True})).eval()


def build_student(teacher, init="random"):
    layout = LayoutSpec.replace(teacher.config.num_hidden_layers, [0, 2], Mamba1Spec(state_size=4))
    return convert(teacher, layout, init, seed=1)[0]


def build_rows(num_rows, seed=0, documents=((4, 9), (3, 7)), length=LENGTH):
    """Rows that each hold a document per (most prompt, most completion tokens), shorter by chance."""
    rng = np.random.default_rng(seed)
    ids, positions, completion, offsets = [], [], [], [0]
    for _ in range(num_rows):
        for most_prompt, most_completion in documents:
            prompt, size = rng.integers(1, most_prompt + 1), rng.integers(2, most_completion + 1)
            ids.append(rng.integers(2, VOCABULARY, prompt + size))
            positions.append(np.arange(prompt + size))
            completion.append(np.arange(prompt + size) >= prompt)
        offsets.append(sum(map(len, ids)))
    return PackedRows(
        np.concatenate(ids).astype(np.int32),
        np.concatenate(positions).astype(np.int32),
        np.concatenate(completion),
        np.array(offsets),
        length,
    )


def build_stage(spec=DistillStage, **changes):
    settings = {
        "name": "train",
        "model": "hybrid",
        "steps": 6,
        "sequence_length": LENGTH,
        "tokens_per_step": 4 * LENGTH,
        "rows_per_batch": 2,
        "learning_rate": 3e-3,
        "save_every": 2,
    }
    return spec(**settings | changes)


class Killed(BaseException):
    """What a killed process would be, for one that must live on."""


class NumberChat:
    """A tokenizer whose messages are token ids in words."""

    chat_template = "numbers"
    eos_token_id = 3

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, return_dict):
        assert tokenize
        assert not return_dict
        assert add_generation_prompt
        return [1, *map(int, messages[-1]["content"].split())]


def build_prompts(num_prompts, seed=0):
    rng = np.random.default_rng(seed)
    words = [rng.integers(4, VOCABULARY, rng.integers(2, 9)) for _ in range(num_prompts)]
    return [[{"role": "user", "content": " ".join(map(str, ids))}] for ids in words]


STAGES = {"distill": DistillStage, "fit": FitStage, "sft": SftStage, "on_policy": OnPolicyStage}


def train(kind, folder, *, kill_after=None, double=False, student=None, rows=None, **changes):
    """Train a fresh student in a folder, perhaps until it is killed after a step: the result, weights, records."""
    teacher = build_teacher()
    if double:
        teacher.double()
    student = build_student(teacher) if student is None else student
    own = {"prompts_per_step": 4, "max_new_tokens": 10} if kind == "on_policy" else {}
    stage = build_stage(STAGES[kind], **own | changes)
    rows = build_rows(stage.steps * stage.tokens_per_step // LENGTH) if rows is None else rows

    def on_log(record, total):
        assert total == stage.steps
        if record["step"] == kill_after:
            raise Killed

    if kind == "distill":
        result = distill(student, teacher, rows, stage, folder, on_log=on_log)
    elif kind == "fit":
        result = fit(student, teacher, rows, stage, folder, on_log=on_log)
    elif kind == "sft":
        result = finetune(student, rows, stage, folder, on_log=on_log)
    else:
        prompts = build_prompts(10)  # gone through more than once
        result = distill_on_policy(student, teacher, prompts, NumberChat(), stage, folder, on_log=on_log)
    return result, copy_of(student), read_metrics(folder / "metrics.jsonl")


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, tensors):
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    different = [name for name, tensor in state.items() if not torch.equal(tensor, tensors[name])]
    assert not different


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny products gain nothing from threads, and on a busy machine lose much by waiting for one another."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=["llama", "mistral"])
def teacher(request):
    return build_teacher(request.param)


@pytest.fixture
def llama():
    return build_teacher()


@pytest.fixture(scope="session")
def tools():
    """The builders above, for tests that need several of each."""

    class Tools:
        killed = Killed
        vocabulary = VOCABULARY
        teacher = staticmethod(build_teacher)
        student = staticmethod(build_student)
        rows = staticmethod(build_rows)
        stage = staticmethod(build_stage)
        prompts = staticmethod(build_prompts)
        chat = NumberChat()
        train = staticmethod(train)
        copy_of = staticmethod(copy_of)
        assert_same = staticmethod(assert_same)

    return Tools


@pytest.fixture(scope="session")
def pocket():
    """The trained teacher that ships with the project, its tokenizer, and packed rows of its world."""
    from pathlib import Path

    from transformers import AutoTokenizer

    from hybridize.data.packing import pack_rows
    from hybridize.models import load_teacher
    from hybridize.spec.data import WorldDataSpec

    folder = Path(__file__).parents[2] / "models" / "pocket-teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = pack_rows(WorldDataSpec(levels=(1,)), tokenizer, 256, 18, 0)
    return load_teacher(folder, dtype=torch.float32), tokenizer, rows

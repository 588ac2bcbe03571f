"""The shipped teacher: what it is, what it can do, and that the method works on its trained weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TEACHER = Path(__file__).parents[1] / "models" / "pocket-teacher"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher():
    from hybridize.models import load_teacher

    return load_teacher(TEACHER, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TEACHER)


def test_teacher_loads_with_transformers_alone():
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(TEACHER)!r})\n"
        f"AutoTokenizer.from_pretrained({str(TEACHER)!r})\n"
        "assert 'hybridize' not in sys.modules\n"
        "print(type(model).__name__, model.num_parameters(), model.config.num_hidden_layers)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, parameters, layers = done.stdout.split()
    assert (name, layers) == ("MistralForCausalLM", "16")
    assert int(parameters) <= 12_000_000
    assert sum(file.stat().st_size for file in TEACHER.glob("*.safetensors")) <= 24_000_000


def test_teacher_answers_unseen_problems(teacher, tokenizer):
    from hybridize.data.world import draw_problem
    from hybridize.evaluation import evaluate_problems

    problems = [draw_problem(task, 1, "test", i) for task in ("addition", "recall", "quantities") for i in range(12)]
    overall = evaluate_problems(teacher, tokenizer, problems, batch_size=36)["overall"]
    assert overall["correct"] >= 30
    assert overall["steps_correct"] >= 28


def test_all_attention_hybrid_equals_the_trained_teacher_bit_for_bit(teacher):
    from hybridize.spec import LayoutSpec, Mamba1Spec
    from hybridize.transfer import convert

    same, _ = convert(teacher, LayoutSpec.replace(16, (), Mamba1Spec()))
    ids = torch.randint(0, 560, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(same(ids).logits, teacher(ids).logits)


@pytest.mark.slow
def test_few_steps_of_distillation_bring_a_hybrid_back_to_the_trained_teacher(teacher, tokenizer, tmp_path):
    from hybridize.data.packing import pack_rows
    from hybridize.spec import LayoutSpec, Mamba1Spec
    from hybridize.spec.data import WorldDataSpec
    from hybridize.spec.stages import DistillStage
    from hybridize.training import distill, heldout_divergence
    from hybridize.transfer import convert

    rows = pack_rows(WorldDataSpec(levels=(1,)), tokenizer, 256, 20 * 2 + 6, 0)
    heldout = rows.part(40, 46)
    hybrid, _ = convert(teacher, LayoutSpec.replace(16, (6, 7, 10, 11, 13, 14), Mamba1Spec()))
    before = heldout_divergence(hybrid, teacher, heldout)
    stage = DistillStage(
        name="d", model="m", steps=20, tokens_per_step=512, sequence_length=256, learning_rate=6e-4, rows_per_batch=2
    )
    distill(hybrid, teacher, rows.part(0, 40), stage, tmp_path)
    after = heldout_divergence(hybrid, teacher, heldout)
    assert after < 0.2 * before

"""After `import hybridize` the Auto classes load hybrids, whatever came first; alone it stays light."""

import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import hybridize
from hybridize.models import save_hybrid

LOAD = """
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
assert type(config).__name__ == "HybridMistralConfig", type(config)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__name__ == "HybridMistralForCausalLM", type(model)
assert transformers.AutoModelForCausalLM.from_config(config).config.mixers == config.mixers
assert not [name for name in sys.modules if name.startswith("transformers.models.llama.modeling")]
"""

ORDERS = {
    "hybridize first": "import sys, hybridize\nassert 'transformers' not in sys.modules\nimport transformers" + LOAD,
    "auto classes first": "import sys, transformers\nfrom transformers import AutoModelForCausalLM\nimport "
    "hybridize" + LOAD,
    "tokenizer first": "import sys, hybridize, transformers\nfrom transformers import AutoTokenizer, Trainer" + LOAD,
}


def run(code, *arguments):
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    heavy = run(
        "import sys, hybridize, hybridize.spec, hybridize.models.families, hybridize.models\n"
        "print(*{'torch', 'transformers', 'numpy', 'safetensors'} & sys.modules.keys())"
    )
    assert heavy.split() == []


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_load_a_hybrid_in_a_fresh_process(order, make_teacher, make_hybrid, tmp_path):
    folder = save_hybrid(make_hybrid(make_teacher("mistral"), [0, 2]), None, tmp_path / "out")
    run(ORDERS[order], folder)


def test_installing_twice_changes_nothing(hybrid, tmp_path):
    finders = list(sys.meta_path)
    hybridize._register.install()
    hybridize._register.install()
    assert sys.meta_path == finders
    folder = save_hybrid(hybrid, None, tmp_path / "out")
    assert type(AutoConfig.from_pretrained(folder)) is type(hybrid.config)
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(hybrid)

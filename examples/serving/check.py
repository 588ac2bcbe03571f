"""Check the vLLM plugin on the machine at hand: answers equal to transformers', and speed on a 15B shape.

    python examples/serving/check.py parity                           # a pocket hybrid of every mixer
    python examples/serving/check.py speed '{"word": "ammmm...", "num": 120}'

`parity` serves in fp32 and bf16, eager and with CUDA graphs, in a crowd and alone. `speed` serves random weights at the
paper's shape, the layout as one letter per layer; other keys of its JSON go to vLLM. The package must be installed, so
that vLLM finds its plugin.
"""

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

TEACHER = Path(__file__).resolve().parents[2] / "models" / "pocket-teacher"
PROMPT_LENGTHS = (300, 5, 130, 257, 1, 64, 200, 33, 90, 2)
NEW_TOKENS = 48
GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}}
MODES = {
    "eager": {"enforce_eager": True},
    "graphs": GRAPHS,
    "graphs, prefix caching": GRAPHS | {"enable_prefix_caching": True, "max_num_batched_tokens": 1024},
}


def make_hybrid(word: str, out: Path) -> None:
    """A hybrid of the pocket teacher with random mixers, strong enough to matter."""
    from hybridize.models import convert_model, load_teacher, save_hybrid
    from hybridize.spec import LayoutSpec, SlidingWindowSpec

    torch.manual_seed(0)
    blocks = {"s": SlidingWindowSpec(window=16), "S": SlidingWindowSpec(window=16, sink=True)}
    layout = LayoutSpec.read(word, {letter: spec for letter, spec in blocks.items() if letter in word})
    hybrid = convert_model(load_teacher(str(TEACHER), dtype=torch.float32), layout)
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if ".mixer." in name and parameter.ndim == 2 and "A_log" not in name:
                parameter.mul_(4)
    save_hybrid(hybrid, None, out)


def answers_of_transformers(folder: Path, prompts: list[list[int]], dtype: str) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    import hybridize  # noqa: F401  (registers the hybrids)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return [
            model.generate(torch.tensor([prompt], device=device), **options)[0, len(prompt) :].tolist()
            for prompt in prompts
        ]


def parity(options: dict) -> None:
    from vllm import LLM, SamplingParams

    word = options.pop("word", "aamaagSakma2aiga")
    folder = Path(tempfile.mkdtemp()) / word
    make_hybrid(word, folder)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(8, 500, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)

    def ask(llm: LLM, requests: list[dict]) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in llm.generate(requests, params, use_tqdm=False)]

    for dtype in ("float32", "bfloat16"):
        wanted = answers_of_transformers(folder, prompts, dtype)
        for mode, extra in MODES.items():
            settings = {"max_model_len": 1024, "max_num_seqs": 8, "enable_prefix_caching": False} | extra | options
            if torch.cuda.is_available():
                settings = {"gpu_memory_utilization": 0.3} | settings
            llm = LLM(str(folder), dtype=dtype, skip_tokenizer_init=True, **settings)
            crowd, again = ask(llm, asked), ask(llm, asked)
            alone = [ask(llm, [request])[0] for request in asked[:4]]
            equal = sum(one == two for one, two in zip(crowd, wanted, strict=True))
            same_alone = sum(one == two for one, two in zip(alone, crowd, strict=False))
            print(
                f"{dtype}, {mode}: equal to transformers {equal} of {len(prompts)}; again the same: {again == crowd}; "
                f"alone as in the crowd: {same_alone} of {len(alone)}",
                flush=True,
            )
            del llm
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def speed(options: dict) -> None:
    from transformers import MistralConfig
    from vllm import LLM, SamplingParams

    from hybridize.models import geometry_of
    from hybridize.models.surgery import hybrid_config_of
    from hybridize.spec import LayoutSpec

    word = options.pop("word", "ammmm" * 10)
    num, length, tokens = options.pop("num", 120), options.pop("length", 1024), options.pop("tokens", 256)
    config = MistralConfig(
        vocab_size=131072,
        hidden_size=5120,
        intermediate_size=14336,
        num_hidden_layers=len(word),
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=65536,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    folder = Path(tempfile.mkdtemp())
    hybrid_config_of(config, LayoutSpec.read(word).resolve(geometry_of(config))).save_pretrained(folder)
    settings = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_num_seqs": num,
        "max_model_len": length + tokens + 16,
        "disable_log_stats": False,
        "compilation_config": {"cudagraph_capture_sizes": [num]},
    }
    llm = LLM(str(folder), **settings | options)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": [17 + number] * length} for number in range(num)]
    llm.generate(asked[:2], SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False), use_tqdm=False)
    began = time.perf_counter()
    outputs = llm.generate(asked, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    all_began = max(output.metrics.first_token_ts for output in outputs)
    ended = max(output.metrics.last_token_ts for output in outputs)
    step = 1e3 * (ended - all_began) / (tokens - 1)
    rate = f"{num * tokens / seconds:,.0f} tokens/s, {step:.1f} ms a step"
    print(f"{word}: {num} x {length}+{tokens}: {seconds:.1f} s, {rate}")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    {"parity": parity, "speed": speed}[sys.argv[1]](json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})

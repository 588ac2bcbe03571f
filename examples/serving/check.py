"""Check the vLLM plugin on the machine at hand: answers equal to transformers', and no block is lost.

    python examples/serving/check.py parity                           # a pocket hybrid of every mixer
    python examples/serving/check.py logprobs                         # the same, trained, in bf16
    python examples/serving/check.py soak                             # 2,000 requests that come at random

`parity` serves in fp32 and bf16, eager and with CUDA graphs, in a crowd and alone. `logprobs` compares the
log-probability of each generated token with what transformers gives the same text; its `hybrid` is a folder to take in
the place of one trained here. `soak` sends requests at random times and counts the cache's blocks before and after,
with the answers of some of them asked again alone. What else is in the JSON goes to vLLM. The package must be
installed, so that vLLM finds its plugin. Speed is measured by `hybridize bench serve`.
"""

import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def layout_of(word: str) -> Any:
    """A layout by its letters: `s` is a window of 16 tokens, `S` one with a sink."""
    from hybridize.spec import LayoutSpec, SlidingWindowSpec

    blocks = {"s": SlidingWindowSpec(window=16), "S": SlidingWindowSpec(window=16, sink=True)}
    return LayoutSpec.read(word, {letter: spec for letter, spec in blocks.items() if letter in word})


def make_hybrid(word: str, out: Path) -> None:
    """A hybrid of the pocket teacher with random mixers, strong enough to matter."""
    from hybridize.models import convert_model, load_teacher, save_hybrid

    torch.manual_seed(0)
    hybrid = convert_model(load_teacher(str(TEACHER), dtype=torch.float32), layout_of(word))
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if ".mixer." in name and parameter.ndim == 2 and "A_log" not in name:
                parameter.mul_(4)
    save_hybrid(hybrid, None, out)


def train_hybrid(word: str, out: Path, steps: int) -> None:
    """The same layers, carried over and distilled on the pocket teacher's own kind of text."""
    from transformers import AutoTokenizer

    from hybridize.models import load_teacher, save_hybrid
    from hybridize.spec.stages import DistillStage
    from hybridize.training import distill
    from hybridize.transfer import convert

    teacher = load_teacher(str(TEACHER), dtype=torch.float32)
    hybrid, _ = convert(teacher, layout_of(word))
    stage = DistillStage(
        name="distill",
        model="convert",
        steps=steps,
        tokens_per_step=2048,
        sequence_length=512,
        rows_per_batch=4,
        train="mixers",
        learning_rate=3e-3,
        warmup_steps=5,
    )
    result = distill(hybrid, teacher, text_rows(4 * steps), stage, out / "training")
    print(f"distilled {steps} steps to {result.final_loss_nats:.4f} nat a token", flush=True)
    save_hybrid(hybrid.to("cpu", torch.bfloat16), AutoTokenizer.from_pretrained(TEACHER), out / "hybrid")


def text_rows(num: int, seed: int = 0) -> Any:
    """Packed rows of the reasoning world's problems and their solutions."""
    from transformers import AutoTokenizer

    from hybridize.data.packing import pack_rows
    from hybridize.spec.data import WorldDataSpec

    return pack_rows(WorldDataSpec(levels=(1, 2)), AutoTokenizer.from_pretrained(TEACHER), 512, num, seed)


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

    modes = options.pop("modes", list(MODES))
    for dtype in options.pop("dtypes", ("float32", "bfloat16")):
        wanted = answers_of_transformers(folder, prompts, dtype)
        for mode in modes:
            extra = MODES[mode]
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


def logprobs(options: dict) -> None:
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    num, folder = options.pop("prompts", 200), options.pop("hybrid", None)
    word, steps = options.pop("word", "aamaagsakma2aiga"), options.pop("steps", 60)
    if folder is None:
        work = Path(tempfile.mkdtemp())
        train_hybrid(word, work, steps)
        folder = str(work / "hybrid")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 450, (num,), generator=generator).tolist()
    rows = text_rows(num, seed=1)
    prompts = [list(rows[number]["input_ids"][:length]) for number, length in enumerate(lengths)]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    for mode in options.pop("modes", ["graphs"]):
        settings = {"max_model_len": 1024, "max_num_seqs": 64, "enable_prefix_caching": False} | MODES[mode] | options
        if torch.cuda.is_available():
            settings = {"gpu_memory_utilization": 0.3} | settings
        llm = LLM(folder, dtype="bfloat16", skip_tokenizer_init=True, **settings)

        def ask(chosen: list[list[int]], llm: LLM = llm) -> list[tuple[list[int], list[float]]]:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in chosen], params, use_tqdm=False)
            answers = [output.outputs[0] for output in outputs]
            return [
                (
                    list(answer.token_ids),
                    [entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)],
                )
                for answer in answers
            ]

        crowd = ask(prompts)
        alone = [ask([prompt])[0] for prompt in prompts[:8]]
        del llm
        gc.collect()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for dtype in ("bfloat16", "float32"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
            differences = torch.cat([_differences(model, *pair) for pair in zip(prompts, crowd, strict=True)])
            print(
                f"{mode}, bfloat16 against transformers in {dtype}: {len(differences)} tokens after {num} prompts; "
                f"difference in nat: largest {differences.max():.4f}, mean {differences.mean():.5f}, "
                f"above 0.05: {(differences > 0.05).sum()}",
                flush=True,
            )
        same = sum(one[0] == two[0] for one, two in zip(alone, crowd, strict=False))
        print(f"{mode}: alone as in a crowd of 64: {same} of {len(alone)}", flush=True)


def _differences(model: Any, prompt: list[int], answer: tuple[list[int], list[float]]) -> torch.Tensor:
    """How far the log-probabilities of an answer's tokens are from the model's, [tokens]."""
    tokens, given = answer
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens], device=model.device)).logits[0, len(prompt) - 1 : -1]
    expected = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens, device=model.device)[:, None])[:, 0]
    return (expected.cpu() - torch.tensor(given)).abs()


def soak(options: dict) -> None:
    from vllm import LLM, SamplingParams

    num, most_at_once = options.pop("requests", 2000), options.pop("max_num_seqs", 64)
    folder = Path(tempfile.mkdtemp()) / "hybrid"
    make_hybrid(options.pop("word", "aamaagSakma2aiga"), folder)
    settings = {"max_model_len": 512, "max_num_seqs": most_at_once, "enable_prefix_caching": False} | options
    if torch.cuda.is_available():
        settings = {"gpu_memory_utilization": 0.3} | settings
    llm = LLM(str(folder), dtype=settings.pop("dtype", "float32"), skip_tokenizer_init=True, **settings)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    draw = torch.Generator().manual_seed(0)

    def random_int(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draw))

    free, began, answers, prompts, sent, steps = pool.get_num_free_blocks(), time.perf_counter(), {}, {}, 0, 0
    while sent < num or engine.has_unfinished_requests():
        for _ in range(min(random_int(0, 8), num - sent)):
            prompt = torch.randint(8, 500, (random_int(1, 200),), generator=draw).tolist()
            prompts[str(sent)] = prompt, random_int(1, 40)
            params = SamplingParams(temperature=0, max_tokens=prompts[str(sent)][1], ignore_eos=True, detokenize=False)
            engine.add_request(str(sent), {"prompt_token_ids": prompt}, params)
            sent += 1
        steps += 1
        for output in engine.step():
            if output.finished:
                answers[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
    seconds = time.perf_counter() - began
    print(f"{len(answers)} requests answered in {seconds:.0f} s, {steps} steps; free blocks {free} before", end=" ")
    print(f"and {pool.get_num_free_blocks()} after", flush=True)
    same = 0
    for name in list(answers)[:: max(1, len(answers) // 20)]:
        prompt, tokens = prompts[name]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        same += list(output.outputs[0].token_ids) == answers[name]
    print(f"asked again alone, the same answer: {same} of {len(list(answers)[:: max(1, len(answers) // 20)])}")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    verb = {"parity": parity, "logprobs": logprobs, "soak": soak}[sys.argv[1]]
    verb(json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})

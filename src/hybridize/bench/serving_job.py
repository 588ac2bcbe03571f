"""Serve one model with vLLM in this process and measure it: `python -m hybridize.bench.serving_job JOB.json`.

Each model has a process of its own, so that one that fails loses nothing of the others. Records go to the job's file as
they are made, one JSON object a line; see `hybridize.bench.serving`, which starts this.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from hybridize.bench.prediction import CachePlan, Gpu, ServedShape, cache_bytes, floor_seconds
from hybridize.bench.scenarios import Scenario

WARM_STEPS = 8
"""Decode steps that do not count, before those that do."""

SHORTEST_SPAN = WARM_STEPS + 3
"""New tokens of a sampled scenario must be so many, and one more for each repeat."""


@dataclass(frozen=True)
class Window:
    """Decode steps of a whole crowd, timed.

    Attributes:
        context: tokens of each sequence in the middle of the window.
        step_ms: mean of a step.
    """

    context: float
    step_ms: float


def main() -> None:
    """Run a job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    scenarios = [Scenario(*pair) for pair in job["scenarios"]]
    shape = ServedShape(**{**job["shape"], **{k: tuple(job["shape"][k]) for k in ("windows", "states")}})
    begun = time.perf_counter()
    served = Served(job, shape, scenarios)
    ready = time.perf_counter() - begun
    for scenario in scenarios:
        measured = served.whole(scenario) if job["whole"] else served.sampled(scenario)
        record = served.describe(scenario) | measured | {"start_seconds": ready}
        append_record(Path(job["records"]), record)


class Served:
    """A model in vLLM, ready to be measured.

    Args:
        job: what `hybridize.bench.serving` wrote.
        shape: the model's sizes.
        scenarios: all that will be measured.
    """

    def __init__(self, job: dict[str, Any], shape: ServedShape, scenarios: Sequence[Scenario]) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        from hybridize.bench import filled_cache

        self.job, self.shape = job, shape
        # Nothing here may touch the GPU before vLLM does, which counts what it finds taken.
        self.on_gpu = current_platform.is_cuda()
        self.memory = current_platform.get_device_total_memory() if self.on_gpu else None
        limit = max(self._guess(scenario) for scenario in scenarios)
        options: dict[str, Any] = {
            "load_format": "dummy",
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "max_num_seqs": limit,
            "max_model_len": max(scenario.tokens for scenario in scenarios) + 1,
            "kv_transfer_config": {
                "kv_connector": filled_cache.FilledCache.__name__,
                "kv_connector_module_path": filled_cache.__name__,
                "kv_role": "kv_both",
            },
        }
        if job["step_tokens"]:
            options["max_num_batched_tokens"] = job["step_tokens"]
        if job["state_dtype"] != "float32":
            options["mamba_ssm_cache_dtype"] = job["state_dtype"]
        if self.on_gpu:
            options["gpu_memory_utilization"] = job["utilization"]
            sizes = sorted({size for scenario in scenarios for size in graph_sizes(self._guess(scenario))} | {1, 2, 4})
            options["compilation_config"] = {"cudagraph_capture_sizes": [size for size in sizes if size <= limit]}
        else:
            options["enforce_eager"] = True
        self.options = options
        self.llm = LLM(job["folder"], **options)
        self.steps, self.cache = filled_cache.STEPS, filled_cache.CACHES[-1]
        self._filled_key = filled_cache.FILLED_TOKENS
        self.copy_bandwidth = _copy_bandwidth()

    def _guess(self, scenario: Scenario) -> int:
        """The most sequences that the memory will hold, before vLLM has said how much there is."""
        most = self.job["max_sequences"]
        if self.memory:
            cache = cache_bytes(self.shape, Gpu(self.memory, 1.0, 1.0), self.job["utilization"])
            held = int(1.08 * CachePlan.of(self.shape).sequences(cache, scenario.tokens)) + 1
            most = min(held, most or held)
        return most or 8

    def sequences(self, scenario: Scenario) -> int:
        """How many complete sequences vLLM's cache holds."""
        return (self.cache.num_blocks - 1) // self._blocks(scenario.tokens)

    def _blocks(self, tokens: int) -> int:
        """Blocks that a sequence holds, by what vLLM says of its groups."""
        blocks = 0
        for group in self.cache.kv_cache_groups:
            spec = group.kv_cache_spec
            kind = type(spec).__name__
            whole = -(-tokens // spec.block_size)
            if kind == "MambaSpec":
                whole = 1
            elif getattr(spec, "sliding_window", None):
                whole = min(whole, -(-spec.sliding_window // spec.block_size) + 1)
            blocks += whole
        return blocks

    def crowd(self, scenario: Scenario) -> int:
        """How many sequences are measured: those that fit, and for which the engine was made ready.

        Raises:
            RuntimeError: not even one fits.
        """
        sequences = min(self.sequences(scenario), self._guess(scenario), self.options["max_num_seqs"])
        if sequences < 1:
            raise RuntimeError(f"the memory holds no sequence of {scenario.tokens} tokens")
        return sequences

    def describe(self, scenario: Scenario) -> dict[str, Any]:
        """What a record says of the model and the machine."""
        import torch
        import vllm

        groups, config = self.cache.kv_cache_groups, self.llm.llm_engine.vllm_config
        return {
            "model": self.job["name"],
            "layout": self.job["word"],
            "scenario": str(scenario),
            "prompt_tokens": scenario.prompt_tokens,
            "new_tokens": scenario.new_tokens,
            "kv_groups": len(groups),
            "block_tokens": sorted({group.kv_cache_spec.block_size for group in groups}),
            "page_bytes": groups[0].kv_cache_spec.page_size_bytes,
            "num_blocks": self.cache.num_blocks,
            "blocks_per_sequence": self._blocks(scenario.tokens),
            "sequences_that_fit": self.sequences(scenario),
            "capacity_tokens": self.sequences(scenario) * scenario.tokens,
            "weight_bytes": self.shape.weight_bytes,
            "read_bytes": self.shape.read_bytes,
            "state_bytes": sum(self.shape.states),
            "kv_bytes_per_token": self.shape.kv_bytes * len(self.shape.windows),
            "copy_gb_per_s": self.copy_bandwidth / 1e9,
            "device": torch.cuda.get_device_name() if self.on_gpu else "cpu",
            "memory_bytes": self.memory,
            "utilization": self.job["utilization"] if self.on_gpu else None,
            "state_dtype": self.job["state_dtype"],
            "asked": self.job["asked"],
            "model_runner": 2 if getattr(config, "use_v2_model_runner", False) else 1,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "step_tokens": config.scheduler_config.max_num_batched_tokens,
            "graph_sizes": self.options.get("compilation_config", {}).get("cudagraph_capture_sizes", []),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
        }

    def sampled(self, scenario: Scenario) -> dict[str, Any]:
        """Measure steps at the scenario's start, middle and end, and prompts by themselves; the rest is summed up."""
        repeats, crowd = self.job["repeats"], self.crowd(scenario)
        span = min(scenario.new_tokens - 1, WARM_STEPS + repeats * self.job["steps"] + 2)
        first, last = scenario.prompt_tokens, scenario.tokens - span
        starts = [first, (first + last) // 2, last] if last - first >= span else [first]
        self._generate(crowd, first, WARM_STEPS, filled=first - 1)  # compiles what has not been yet
        windows = [self._decode(crowd, start, span) for start in starts]
        prefill = self._prefill(crowd, scenario) if scenario.prompt_tokens > 1 else [0.0] * repeats
        rates = []
        for repeat in range(repeats):
            seconds = prefill[repeat] + decode_seconds(scenario, [point[repeat] for point in windows])
            rates.append(crowd * scenario.new_tokens / seconds)
        step_ms = 1e3 * decode_seconds(scenario, [_middle(point) for point in windows]) / _num_steps(scenario)
        floor_ms = 1e3 * self._floor_seconds(scenario, crowd)
        return {
            "method": "sampled",
            "sequences": crowd,
            "points": [[asdict(window) for window in point] for point in windows],
            "prefill_seconds": prefill,
            **_summary(rates, step_ms, floor_ms),
        }

    def whole(self, scenario: Scenario) -> dict[str, Any]:
        """Run the scenario in full, prompts and all new tokens."""
        crowd = self.crowd(scenario)
        self._generate(crowd, scenario.prompt_tokens, WARM_STEPS)
        seconds, steps = [], []
        for _ in range(self.job["repeats"]):
            del self.steps[:]
            begun = time.perf_counter()
            self._generate(crowd, scenario.prompt_tokens, scenario.new_tokens)
            seconds.append(time.perf_counter() - begun)
            decodes = _crowd_steps(self.steps, crowd)
            steps.append(1e3 * (decodes[-1].seconds - decodes[0].seconds) / (len(decodes) - 1))
        rates = [crowd * scenario.new_tokens / elapsed for elapsed in seconds]
        floor_ms = 1e3 * self._floor_seconds(scenario, crowd)
        return {"method": "whole", "sequences": crowd, "seconds": seconds, **_summary(rates, median(steps), floor_ms)}

    def _floor_seconds(self, scenario: Scenario, crowd: int) -> float:
        """Of the mean step: weights and keys and values read once, states read and written once, at a copy's speed."""
        contexts = [scenario.prompt_tokens + scenario.new_tokens * (i + 0.5) / 64 for i in range(64)]
        return mean(floor_seconds(self.shape, self.copy_bandwidth, crowd, context) for context in contexts)

    def _decode(self, crowd: int, context: int, span: int) -> list[Window]:
        """Time the decode steps of a crowd whose caches hold `context` tokens: a window for each repeat.

        Raises:
            RuntimeError: vLLM did not run the whole crowd in every step, so there is nothing to time.
        """
        del self.steps[:]
        self._generate(crowd, context, span, filled=context - 1)
        steps = _crowd_steps(self.steps, crowd)
        repeats = self.job["repeats"]
        length = (len(steps) - 1 - WARM_STEPS) // repeats
        windows = []
        for repeat in range(repeats):
            first = WARM_STEPS + repeat * length
            elapsed = steps[first + length].seconds - steps[first].seconds
            windows.append(Window(context + first + length / 2, 1e3 * elapsed / length))
        return windows

    def _prefill(self, crowd: int, scenario: Scenario) -> list[float]:
        """Seconds in which the crowd's prompts are read, from a part of them that fills a few steps."""
        per_step = self.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
        part = min(crowd, max(1, -(-2 * per_step // scenario.prompt_tokens)))
        seconds = []
        for repeat in range(self.job["repeats"] + 1):
            begun = time.perf_counter()
            self._generate(part, scenario.prompt_tokens, 1)
            if repeat:
                seconds.append((time.perf_counter() - begun) * crowd / part)
        return seconds

    def _generate(self, crowd: int, prompt_tokens: int, new_tokens: int, filled: int = 0) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": {self._filled_key: filled}} if filled else None,
        )
        draw = random.Random(prompt_tokens)
        most = self.job["vocab_size"] - 1
        prompts = [
            {
                "prompt_token_ids": [draw.randint(1, most)] * filled
                + draw.choices(range(1, most), k=prompt_tokens - filled)
            }
            for _ in range(crowd)
        ]
        self.llm.generate(prompts, params, use_tqdm=False)


def append_record(file: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of JSON lines, on a line of its own even if a killed process left half of one."""
    whole = not file.is_file() or file.read_bytes()[-1:] in (b"", b"\n")
    with file.open("a") as stream:
        stream.write(("" if whole else "\n") + json.dumps(record) + "\n")


def graph_sizes(most: int) -> list[int]:
    """Batch sizes for which CUDA graphs are made so that a crowd near `most` is padded by at most a 16th.

    Args:
        most: no crowd is larger.
    """
    gap = max(1, most // 16)
    return list(range(most, max(0, (4 * most) // 5 - gap), -gap))[::-1]


def decode_seconds(scenario: Scenario, windows: Sequence[Window]) -> float:
    """Seconds of all decode steps of a scenario, the step's time taken as linear between the windows.

    Args:
        scenario: whose steps.
        windows: in the order of their context; beyond the first and the last, their line goes on.
    """
    first = scenario.tokens - _num_steps(scenario)
    if len(windows) == 1:
        return 1e-3 * windows[0].step_ms * _num_steps(scenario)
    total, begin = 0.0, float(first)
    for i, (left, right) in enumerate(pairwise(windows)):
        end = float(scenario.tokens) if i == len(windows) - 2 else right.context
        slope = (right.step_ms - left.step_ms) / (right.context - left.context)
        middle = left.step_ms + slope * ((begin + end) / 2 - left.context)
        total += (end - begin) * middle
        begin = end
    return 1e-3 * total


def _num_steps(scenario: Scenario) -> int:
    """Decode steps of a scenario: the first new token comes with the prompt, if that is more than a token."""
    return scenario.new_tokens - (scenario.prompt_tokens > 1)


def _crowd_steps(steps: Sequence[Any], crowd: int) -> list[Any]:
    """The decode steps in which the whole crowd took part; they must follow one another.

    Raises:
        RuntimeError: there are none, or others lie between.
    """
    whole = [i for i, step in enumerate(steps) if step.requests == step.tokens == crowd]
    if not whole or whole[-1] - whole[0] != len(whole) - 1:
        seen = sorted({(step.requests, step.tokens) for step in steps})
        raise RuntimeError(f"vLLM did not run {crowd} sequences together; (requests, tokens) of its steps: {seen[:8]}")
    return [steps[i] for i in whole]


def _middle(point: Sequence[Window]) -> Window:
    """The window of a point's median step."""
    return Window(mean(window.context for window in point), median(window.step_ms for window in point))


def _summary(rates: Sequence[float], step_ms: float, floor_ms: float) -> dict[str, Any]:
    return {
        "tokens_per_second": median(rates),
        "tokens_per_second_repeats": list(rates),
        "step_ms": step_ms,
        "floor_ms": floor_ms,
    }


def _copy_bandwidth() -> float:
    """Bytes per second of a copy much larger than the cache, read and written ones counted."""
    import torch

    from hybridize.bench.kernels import median_ms

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / (1e-3 * median_ms(lambda _: target.copy_(source), device, 10))
    source = target = torch.empty(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return bandwidth


if __name__ == "__main__":
    main()

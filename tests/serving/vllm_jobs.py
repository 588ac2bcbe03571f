"""Run by the tests in a process of its own: engines of vLLM on the CPU, asked for greedy tokens.

    python vllm_jobs.py JOBS.json RESULTS.json

A job is an engine: its `model` and `options`, and `calls`, each a list of prompts that are sent at once. Its result is
the tokens of every call, or the error; and how many cache blocks were free before and after, how many requests were
preempted and how many prompt tokens came from the prefix cache. With `group_by_group`, each group of mixers asks for
its metadata at every step, as in vLLM's newer model runner; the result then says how often that was, and how often it
was made from scratch.
"""

import gc
import json
import os
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
}


def run(job):
    """Run one engine."""
    from vllm import LLM, SamplingParams

    llm = LLM(job["model"], **DEFAULTS | job.get("options", {}))
    params = SamplingParams(temperature=0, max_tokens=job.get("tokens", 16), ignore_eos=True, detokenize=False)
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    result = {"tokens": [], "cached": []}
    if core is not None:
        pool = core.scheduler.kv_cache_manager.block_pool
        preempt, count = core.scheduler._preempt_request, []

        def counted(*args, **kwargs):
            count.append(1)
            return preempt(*args, **kwargs)

        core.scheduler._preempt_request = counted
        result["free"] = [pool.get_num_free_blocks()]
    if job.get("group_by_group"):
        result["metadata"] = counted_metadata()
    for call in job["calls"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in call]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        result["tokens"].append([list(output.outputs[0].token_ids) for output in outputs])
        result["cached"].append([output.num_cached_tokens for output in outputs])
    if core is not None:
        result["free"].append(pool.get_num_free_blocks())
        result["preempted"] = len(count)
    return result


def counted_metadata():
    """Let every group ask for its metadata, and count how often that is and how often it is made from scratch."""
    from hybridize.serving.metadata import MixerMetadataBuilder

    MixerMetadataBuilder.supports_update_block_table = False
    counts = {"build": 0, "_build_first": 0}

    def count(name, method):
        def counted(*args, **kwargs):
            counts[name] += 1
            return method(*args, **kwargs)

        setattr(MixerMetadataBuilder, name, counted)

    for name in counts:
        count(name, getattr(MixerMetadataBuilder, name))
    return counts


def main():
    """Run the jobs of a file, one after the other."""
    jobs_file, results_file = sys.argv[1:]
    results = []
    with open(jobs_file) as file:
        jobs = json.load(file)
    for job in jobs:
        try:
            results.append(run(job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
    with open(results_file, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()

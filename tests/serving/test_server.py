"""The OpenAI-compatible server: `vllm serve OUT` answers chat completions over HTTP, at once and streamed."""

import contextlib
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from serving_examples import needs_vllm, random_hybrid
from transformers import AutoTokenizer

from hybridize.models import load_model, load_teacher, save_hybrid

TEACHER = Path(__file__).parents[2] / "models" / "pocket-teacher"
QUESTIONS = ["12 + 35 = ?", "Count to three.", "7 + 8 = ?"]
TOKENS = 20
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture
def served(tmp_path):
    """The folder of a hybrid of the pocket teacher, with its tokenizer and chat template."""
    if not TEACHER.is_dir():
        pytest.skip(f"no teacher at {TEACHER}")
    hybrid = random_hybrid(load_teacher(TEACHER, dtype=torch.float32), "aamaagaakaaa2aia")
    return save_hybrid(hybrid, AutoTokenizer.from_pretrained(TEACHER), tmp_path / "hybrid")


@contextlib.contextmanager
def serving(folder, log):
    """Run `vllm serve` on a free port until it is ready; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        importlib.metadata.version("vllm")
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    except importlib.metadata.PackageNotFoundError:  # a build of another name, whose `vllm` command does not start
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += [
        "--served-model-name",
        "hybrid",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
    ]
    command += ["--max-num-seqs", "4", "--enforce-eager"]
    with log.open("w") as output:
        server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(400):
                assert server.poll() is None, log.read_text()[-4000:]
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                time.sleep(1)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def ask(address, question, stream):
    """One chat completion: its text, and in how many pieces it came."""
    body = {
        "model": "hybrid",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": stream,
    }
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        if not stream:
            return json.load(response)["choices"][0]["message"]["content"], 1
        lines = [line.decode().removeprefix("data: ").strip() for line in response if line.startswith(b"data: ")]
    assert lines[-1] == "[DONE]"
    deltas = [choice["delta"].get("content") for line in lines[:-1] for choice in json.loads(line)["choices"]]
    pieces = [piece for piece in deltas if piece]
    return "".join(pieces), len(pieces)


@torch.no_grad()
def expected_answers(folder):
    model, tokenizer = load_model(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    texts = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        tokens = model.generate(prompt, **options)[0, prompt.shape[1] :]
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return texts


@needs_vllm
def test_server_answers_chats_as_transformers_does_at_once_and_streamed(served, tmp_path):
    expected = expected_answers(served)
    assert len(set(expected)) > 1, "these answers would hide errors"
    with serving(served, tmp_path / "server.log") as address:
        for question, text in zip(QUESTIONS, expected, strict=True):
            assert ask(address, question, stream=False) == (text, 1)
            streamed, num_pieces = ask(address, question, stream=True)
            assert streamed == text
            assert num_pieces > 3

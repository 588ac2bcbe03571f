"""What vLLM looks like from outside."""

from types import SimpleNamespace


class FakeVllm:
    """vLLM's offline interface: answers each prompt with its own tokens turned round, ended if they fit."""

    def __init__(self, stop):
        self.stop = stop
        self.calls = []

    def SamplingParams(self, *, n, temperature, top_p, max_tokens, seed, stop_token_ids, detokenize):
        return SimpleNamespace(**{name: value for name, value in locals().items() if name != "self"})

    def LLM(self, **options):
        self.options = options
        return self

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert len(prompts) == len(sampling_params)
        self.calls.append(sampling_params)
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert (params.n, params.detokenize, use_tqdm) == (1, False, False)
            assert params.stop_token_ids == [self.stop]
            ids = [*reversed(prompt["prompt_token_ids"]), self.stop]
            reason = "stop" if len(ids) <= params.max_tokens else "length"
            completion = SimpleNamespace(text="", token_ids=ids[: params.max_tokens], finish_reason=reason)
            outputs.append(SimpleNamespace(outputs=[completion]))
        return outputs

"""Making training data: the teacher's own verified answers."""

from typing import Literal, Self

from pydantic import Field, model_validator

from hybridize.spec.stages.base import TEACHER, DataStage


class TracesStage(DataStage):
    """Let a model answer prompts, verify the answers, keep the right ones.

    Attributes:
        model: by default the teacher.
        num_prompts: taken from the start of the data.
        samples_per_prompt: answers to each.
        temperature: of sampling; 0 is greedy.
        top_p: nucleus that is sampled from.
        max_new_tokens: of an answer.
        verifier: `world` (the reasoning world's judge, every step), `math` (math-verify, against the reference answer),
            `none` (keep all, also those cut at max_new_tokens), or `file.py:function`, a function of (prompt, answer,
            reference) -> bool; `auto` takes `world` for the reasoning world and `math` for everything else.
        engine: what generates.
        batch_size: answers generated at a time.
    """

    kind: Literal["traces"] = "traces"
    model: str = TEACHER
    num_prompts: int = Field(default=1000, gt=0)
    samples_per_prompt: int = Field(default=1, gt=0)
    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=2048, gt=0)
    verifier: str = "auto"
    engine: Literal["transformers", "vllm"] = "transformers"
    batch_size: int = Field(default=64, gt=0)

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples_per_prompt > 1 and not self.temperature:
            raise ValueError(
                f"samples_per_prompt: {self.samples_per_prompt} greedy answers are all the same; give a temperature, "
                "e.g. 0.6"
            )
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """The model that answers."""
        return (self.model,)

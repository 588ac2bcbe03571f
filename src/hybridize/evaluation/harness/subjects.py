"""MMLU as one task over all subjects; imported by lm-evaluation-harness when the task is loaded."""

from collections.abc import Mapping
from typing import Any

from lm_eval.api.task import ConfigurableTask


class SubjectTask(ConfigurableTask):
    """A multiple-choice task whose examples are of the question's own subject, in plain text.

    It never goes through a chat template: the model says how likely each letter is as the next word of a text, which is
    how the benchmark's numbers are measured, and no question to a model that thinks first.
    """

    IS_PLAIN = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._examples: dict[str, list[dict[str, Any]]] = {}
        for row in self.dataset["dev"]:
            self._examples.setdefault(row["subject"], []).append(row)

    def build_all_requests(self, **options: Any) -> None:
        """Prepare the questions, without the chat template."""
        super().build_all_requests(**options | {"apply_chat_template": False, "system_instruction": None})

    def fewshot_context(self, doc: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """A question behind its subject's examples."""
        self.sampler.replace_df(self._examples[doc["subject"]])
        return super().fewshot_context(doc, *arguments, **options)

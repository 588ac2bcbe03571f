"""Judge a model by what it generates: answers and steps, per task, with confidence intervals."""

from hybridize.evaluation.generation import Attempt, evaluate_problems, generate_replies, summarise
from hybridize.evaluation.score import PassAtK, Score

__all__ = ["Attempt", "PassAtK", "Score", "evaluate_problems", "generate_replies", "summarise"]

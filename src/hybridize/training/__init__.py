"""Distillation on the Hugging Face Trainer: a hybrid learns the teacher's next-token distributions.

Loop, schedule, clipping, optimiser and checkpoints are the Trainer's. Added are the loss, a resume that
trusts only complete checkpoints, metrics that survive a kill, and a stop at the first loss that is not
finite.
"""

from hybridize.training.checkpoints import CHECKPOINTS
from hybridize.training.distill import TrainResult, distill
from hybridize.training.divergence import heldout_divergence
from hybridize.training.metrics import METRICS, read_metrics
from hybridize.training.trainer import DivergedError

__all__ = [
    "CHECKPOINTS",
    "METRICS",
    "DivergedError",
    "TrainResult",
    "distill",
    "heldout_divergence",
    "read_metrics",
]

"""Training a hybrid on the Hugging Face Trainer: fit its mixers, distil, fine-tune, distil on its own answers.

Loop, schedule, clipping, optimiser and checkpoints are the Trainer's. Added are the losses, a resume that
trusts only complete checkpoints, metrics that survive a kill, and a stop at the first loss that is not
finite.
"""

from hybridize.training.checkpoints import CHECKPOINTS
from hybridize.training.core import DivergedError
from hybridize.training.distill import distill
from hybridize.training.divergence import heldout_divergence
from hybridize.training.fit import fit
from hybridize.training.metrics import METRICS, read_metrics
from hybridize.training.on_policy import distill_on_policy
from hybridize.training.run import TrainResult
from hybridize.training.sft import finetune

__all__ = [
    "CHECKPOINTS",
    "METRICS",
    "DivergedError",
    "TrainResult",
    "distill",
    "distill_on_policy",
    "finetune",
    "fit",
    "heldout_divergence",
    "read_metrics",
]

"""What a target token costs: its NLL and, on request, label smoothing and z-loss. docs/objective.md, section 5.

The costs and their gradient are computed with the logits, in model/fused_head.py.
"""

from torch import Tensor

from sft_dist.config import ObjectiveConfig
from sft_dist.model.batch import Batch
from sft_dist.model.fused_head import LossTerms


def loss_terms(objective: ObjectiveConfig) -> LossTerms:
    return LossTerms(label_smoothing=objective.label_smoothing, z_loss=objective.z_loss)


def is_plain(objective: ObjectiveConfig) -> bool:
    """Whether the loss is the NLL and nothing else."""
    return not objective.label_smoothing and not objective.z_loss


def weighted_nll(logprobs: Tensor, batch: Batch) -> Tensor:
    """-Σ w log p over this batch's targets: what the loss is without label smoothing and z-loss."""
    weights = batch.weights[0, batch.target_rows].to(logprobs.device)
    return -(logprobs * weights).sum()

"""What a target token costs: its NLL and, on request, label smoothing, z-loss and the divergence from θ̂.

docs/objective.md, section 5. The costs and their gradient are computed with the logits, in model/fused_head.py.
"""

from torch import Tensor

from sft_dist.config import RunConfig
from sft_dist.model.batch import Batch
from sft_dist.model.fused_head import LossTerms


def loss_terms(config: RunConfig) -> LossTerms:
    objective = config.objective
    return LossTerms(label_smoothing=objective.label_smoothing, z_loss=objective.z_loss, kl=config.anchor.kl)


def is_plain(config: RunConfig) -> bool:
    """Whether the loss is the NLL and nothing else."""
    return loss_terms(config) == LossTerms()


def weighted_nll(logprobs: Tensor, batch: Batch) -> Tensor:
    """-Σ w log p over this batch's targets: what the loss is without its other terms."""
    weights = batch.weights[0, batch.target_rows].to(logprobs.device)
    return -(logprobs * weights).sum()

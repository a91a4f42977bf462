"""What a target token costs: its NLL and, on request, label smoothing and z-loss. docs/objective.md, section 5.

In: what a forward says of its targets, and their weights. Out: a weighted sum, which the step's denominator divides.
"""

from torch import Tensor

from sft_dist.config import ObjectiveConfig
from sft_dist.model.batch import IGNORE, Batch
from sft_dist.model.logprobs import TokenValues, Wanted


def is_plain(objective: ObjectiveConfig) -> bool:
    """Whether the loss is the NLL and nothing else."""
    return not objective.label_smoothing and not objective.z_loss


def wanted(objective: ObjectiveConfig, *, with_hits: bool) -> Wanted:
    """What the forward must give for this objective, and for accuracies."""
    return Wanted(log_normaliser=bool(objective.z_loss), mean_logprob=bool(objective.label_smoothing), is_top=with_hits)


def token_losses(values: TokenValues, objective: ObjectiveConfig) -> Tensor:
    """float32 [num_targets]: (1 - ε)·nll + ε·mean_v(-log p_v) + ζ·log² Z of every target.

    ε: label smoothing, Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7.
    ζ: z-loss, Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, section 5.
    """
    losses = -values.logprob
    if values.mean_logprob is not None:
        share = objective.label_smoothing
        losses = (1 - share) * losses - share * values.mean_logprob
    if values.log_normaliser is not None:
        losses = losses + objective.z_loss * values.log_normaliser**2
    return losses


def weighted_sum(per_target: Tensor, batch: Batch) -> Tensor:
    """Σ w x over this batch's targets, summed, not averaged: the step's denominator divides it once."""
    weights = batch.weights[0][batch.targets[0] != IGNORE].to(per_target.device)
    return (per_target * weights).sum()

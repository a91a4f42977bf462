"""What a target token costs: its NLL and, on request, label smoothing, z-loss and the divergence from θ̂; and what a
label beside the tokens costs.

docs/objective.md, section 5 and "A head beside the language model". The costs and their gradient are computed with the
logits, in model/fused_head.py and model/classifier.py.
"""

from dataclasses import dataclass

from torch import Tensor

from sft_dist.config import RunConfig
from sft_dist.data.plan import Plan
from sft_dist.model.batch import Batch
from sft_dist.model.fused_head import LossTerms, TokenValues


@dataclass(frozen=True, slots=True)
class Balance:
    """Factors of the sums over a step's target tokens and over its labels, before both are divided by Plan.denominator.

    `labels` is λ_head N / M, N and M the denominators of tokens and of labels, so that each sum has its own.
    """

    language_model: float
    labels: float


def loss_terms(config: RunConfig) -> LossTerms:
    objective = config.objective
    return LossTerms(label_smoothing=objective.label_smoothing, z_loss=objective.z_loss, kl=config.anchor.kl)


def is_plain(config: RunConfig) -> bool:
    """Whether the loss is the NLL and nothing else."""
    return loss_terms(config) == LossTerms() and not config.head.is_beside


def balance_of(config: RunConfig, plan: Plan, step: int) -> Balance | None:
    """Of one step, over all ranks; None without a head beside the language model's."""
    head = config.head
    if not head.is_beside:
        return None
    mass = plan.label_denominator(step)
    return Balance(head.language_model_weight, head.weight * plan.denominator(step) / mass if mass else 0.0)


def joint(loss: Tensor, values: TokenValues, balance: Balance) -> Tensor:
    """The loss of a micro-batch's tokens and of its labels in one sum."""
    assert values.label_loss is not None
    return balance.language_model * loss + balance.labels * values.label_loss


def weighted_nll(logprobs: Tensor, batch: Batch) -> Tensor:
    """-Σ w log p over this batch's targets: what the loss is without its other terms."""
    weights = batch.weights[0, batch.target_rows].to(logprobs.device)
    return -(logprobs * weights).sum()

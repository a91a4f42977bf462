"""What in a run file is bolder than usual for full fine-tuning, in one line each. Pure; a warning and never an error.

What is usual comes from published recipes, read on 2026-11-21 (docs/moderation.md names them). Learning rates fall with
the model's size: SmolLM2 135M and 360M 1e-3, SmolLM2 1.7B 3e-4, SmolLM3 3B and Zephyr 7B 2e-5, Tülu 3 8B 5e-6 and 70B
2e-6, Llama 2 7B to 70B 2e-5 (arXiv 2307.09288, section 3.1); those that say so warm up over 3 to 10 % of the steps, and
all pass over the data one to five times.
"""

from dataclasses import dataclass

from sft_dist.config import RunConfig

# Models of at most so many parameters, and the highest learning rate of the recipes of that size.
_HIGHEST_RATES = ((6e8, 1e-3), (2.5e9, 3e-4), (float("inf"), 2e-5))
_FAR_ABOVE = 2.0  # times that
_MANY_PASSES = 3.0
_FEW_CONVERSATIONS = 10_000
_STRONG_DECAY = 0.1


@dataclass(frozen=True, slots=True)
class Facts:
    """Of the model and the plan, what the run file does not say."""

    num_parameters: int
    num_conversations: int
    num_passes: float  # over the training data, repeats counted


def warnings(config: RunConfig, facts: Facts) -> list[str]:
    """One line for each key that asks for more than is usual: its value, why that matters, what is usual."""
    optimizer = config.optimizer
    highest = highest_usual_rate(facts.num_parameters)
    found = []
    if config.adapter.kind == "none" and optimizer.learning_rate > _FAR_ABOVE * highest:
        found.append(
            f"optimizer.learning_rate: {optimizer.learning_rate:g} takes a model of {_size(facts.num_parameters)} "
            f"parameters far from what it knew; published recipes of this size use {highest:g} at most"
        )
    if optimizer.weight_decay > _STRONG_DECAY:
        found.append(
            f"optimizer.weight_decay: {optimizer.weight_decay:g} draws all matrices toward 0, away from the "
            f"pre-trained ones; usual are 0 to {_STRONG_DECAY:g}"
        )
    if optimizer.max_grad_norm == 0:
        found.append("optimizer.max_grad_norm: 0, no clipping: one odd step may undo many; usual is 1")
    if config.schedule.warmup_fraction == 0:
        found.append(
            "schedule.warmup_fraction: 0, no warmup: the first steps are the largest while AdamW's moments rest on "
            "next to nothing; usual are 0.03 to 0.1"
        )
    if facts.num_passes > _MANY_PASSES and facts.num_conversations < _FEW_CONVERSATIONS:
        found.append(
            f"schedule.epochs: {facts.num_passes:.3g} passes over {facts.num_conversations:,} conversations learn them "
            "by heart; usual are 1 to 3, and the held-out NLL tells when it is enough"
        )
    if not config.data.heldout:
        found.append(
            "data.heldout: empty, so nothing tells when to stop or which checkpoint is the best; usual are a few "
            "hundred conversations that are not trained on"
        )
    return [f"warning: {line}" for line in found]


def highest_usual_rate(num_parameters: int) -> float:
    """The highest peak learning rate of published recipes for models of about this size."""
    return next(rate for most, rate in _HIGHEST_RATES if num_parameters <= most)


def _size(num_parameters: int) -> str:
    return f"{num_parameters / 1e9:.1f}B" if num_parameters >= 1e9 else f"{num_parameters / 1e6:.0f}M"

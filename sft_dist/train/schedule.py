"""Learning rate as a pure function of the step."""

import math

from sft_dist.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of step `step` (from 0) of `num_steps`: linear warmup to the peak, then the named shape.

    cosine: Loshchilov and Hutter, "SGDR", 2017, equation 5, without restarts, down to final_fraction of the peak.
    """
    peak = optimizer.learning_rate
    warmup = round(schedule.warmup_fraction * num_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    match schedule.name:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - (1.0 - schedule.final_fraction) * progress
        case "cosine":
            share = schedule.final_fraction + (1.0 - schedule.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * share

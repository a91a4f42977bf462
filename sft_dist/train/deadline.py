"""When the job that this run is a part of will be ended, and whether it is time to stop and save. Pure: variables and
times in, an answer out. The time is in seconds since 1970, by the clock of the machine."""

import math
from collections.abc import Mapping

# Set by Slurm from 23.02 on, and by slurm/train.sbatch for older ones.
VARIABLE = "SLURM_JOB_END_TIME"


def job_end_s(env: Mapping[str, str]) -> float:
    """When the job's time limit is reached; infinity where there is none or it is not known."""
    try:
        return float(env[VARIABLE])
    except (KeyError, ValueError):
        return math.inf


def is_near(end_s: float, *, now_s: float, longest_step_s: float, saving_s: float, margin_s: float) -> bool:
    """Whether to stop now rather than after one more step.

    The next step may take as long as the longest so far, evaluation and waiting for checkpoints between two steps
    included. Then saving begins: it takes `saving_s` where checkpoints have been written beside the steps, else no
    longer than that longest step; `margin_s` is for what has not been seen yet.
    """
    return now_s + longest_step_s + max(longest_step_s, saving_s) + margin_s >= end_s

"""A rank of a small world with the real watchdog and real collectives, and steps that compute nothing.

`python -m tests.helpers.watched_rank FOLDER TIMEOUT_S`: forty steps, or what SFT_DIST_FAULTS makes of them. A file in
FOLDER is touched at each step; the outcome is written there as a run's is.
"""

import os
import sys
import time
from pathlib import Path

import torch

from sft_dist import faults
from sft_dist.distributed import collectives, watchdog
from sft_dist.distributed.beats import Process
from sft_dist.distributed.watchdog import Watchdog
from sft_dist.distributed.world import find_world, start
from sft_dist.errors import exit_code_of, say
from sft_dist.train.rundir import write_outcome

NUM_STEPS = 40
WORK_S = 0.02


def main(folder: Path, timeout_s: float) -> int:
    world = find_world(os.environ)
    faults.reach("before.meeting", rank=world.rank)
    store = watchdog.connect(world, timeout_s=timeout_s)

    def leave(exit_code: int, reason: str, main: Process | None) -> None:
        write_outcome(folder, exit_code=exit_code, reason=reason, step=None, checkpoint=None)

    with Watchdog(world, store, timeout_s=timeout_s, slow_ratio=1.5, on_leave=leave, window_s=timeout_s) as watching:
        watching.meet("start")
        start(world, on_gpu=False)
        for step in range(1, NUM_STEPS + 1):
            watching.enter("data", step)
            (folder / f"rank-{world.rank}").touch()
            faults.reach("data", rank=world.rank, step=step)
            watching.enter("forward", step)
            collectives.all_sum([1.0])
            faults.reach("forward", rank=world.rank, step=step)
            deadline = time.monotonic() + WORK_S
            while time.monotonic() < deadline:
                torch.ones(100).sum()
            faults.reach("slow", rank=world.rank)
            collectives.all_sum([1.0])
        collectives.barrier()
    return 0


if __name__ == "__main__":
    try:
        code = main(Path(sys.argv[1]), float(sys.argv[2]))
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        code = exit_code_of(error)
        if os.environ["RANK"] == "0":
            write_outcome(Path(sys.argv[1]), exit_code=code, reason=str(error), step=None, checkpoint=None)
    os._exit(code)

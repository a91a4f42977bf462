"""Opening and closing the process group of a verb: device, threads, backend."""

import os
import re
from collections.abc import Callable

import torch

from sft_dist.distributed import collectives
from sft_dist.distributed.world import World, start
from sft_dist.errors import ClusterError, say
from sft_dist.model.engine import set_environment


def open_session(world: World) -> None:
    """Choose this rank's device and threads and join the other ranks. Raises ClusterError."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    set_environment()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    start(world, on_gpu=on_gpu)


def close_session() -> None:
    """No rank leaves before the others have done their work: launchers kill the rest at the first exit that is not 0.

    The group is not destroyed: the process ends right after (cli), and destroying waits for peers that may be gone.
    """
    collectives.barrier()


def print_from_main(world: World) -> Callable[[str], None]:
    """A function that prints a line to stderr on rank 0 and nowhere else."""

    def say_from_main(line: str) -> None:
        if world.is_main:
            say(line)

    return say_from_main


def for_people(error: BaseException) -> BaseException:
    """A collective that fails because a peer died is no bug of this rank; everything else stays what it is."""
    text = str(error)
    if isinstance(error, RuntimeError) and re.search("(?i)closed by peer|connection reset|broken pipe", text):
        return ClusterError(f"another rank is gone: {text.splitlines()[0]}")
    return error

"""Opening and closing the process group of a verb: device, threads, backend."""

import os
from collections.abc import Callable

import torch

from sft_dist.config import WatchdogConfig
from sft_dist.distributed import collectives, watchdog
from sft_dist.distributed.watchdog import OnLeave, Watchdog
from sft_dist.distributed.world import World, start
from sft_dist.errors import ClusterError, say
from sft_dist.model.engine import set_environment

# A collective fails by itself after this: the watchdog, which can name the rank, is to come first.
_GROUP_TIMEOUT_S = 1_800.0


def open_session(world: World, config: WatchdogConfig | None = None, on_leave: OnLeave | None = None) -> Watchdog:
    """Choose this rank's device and threads and join the other ranks, watched from there on. Raises ClusterError.

    What the ranks do together belongs into the context of the watchdog: there an error of one ends all. `on_leave`
    writes the outcome when the watchdog ends the run.
    """
    from transformers.utils import logging

    config = config or WatchdogConfig()
    logging.disable_progress_bar()
    use_huge_pages()
    set_environment()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    store = watchdog.connect(world, timeout_s=config.timeout_s)
    watching = Watchdog(world, store, timeout_s=config.timeout_s, slow_ratio=config.slow_ratio, on_leave=on_leave)
    try:
        watching.meet("start")
        start(world, on_gpu=on_gpu, timeout_s=max(_GROUP_TIMEOUT_S, 2 * config.timeout_s))
    except ClusterError as error:
        raise watching.told(error) from error
    return watching


def use_huge_pages() -> None:
    """Let tensors of 2 MiB and more lie in huge pages, unless the user has said otherwise. Before the first tensor.

    glibc gives large blocks back to the kernel when they are freed, so every step of a CPU rank faulted its logits and
    gradients in anew, 4 KiB at a time. PyTorch then advises the kernel (madvise, MADV_HUGEPAGE), which is heeded where
    /sys/kernel/mm/transparent_hugepage/enabled is not `never`; the kernel faults 2 MiB at once, and the same memory is
    resident. Keeping blocks instead (M_TRIM_THRESHOLD, M_MMAP_MAX) also saves faults, but holds a quarter more memory.
    https://man7.org/linux/man-pages/man3/mallopt.3.html, https://docs.kernel.org/admin-guide/mm/transhuge.html
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


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

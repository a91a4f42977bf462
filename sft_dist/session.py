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
    use_huge_pages()
    set_environment()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    start(world, on_gpu=on_gpu)


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


def for_people(error: BaseException) -> BaseException:
    """A collective that fails because a peer died is no bug of this rank; everything else stays what it is."""
    text = str(error)
    if isinstance(error, RuntimeError) and re.search("(?i)closed by peer|connection reset|broken pipe", text):
        return ClusterError(f"another rank is gone: {text.splitlines()[0]}")
    return error

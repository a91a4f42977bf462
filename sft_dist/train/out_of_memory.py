"""Out of memory: which batch did not fit, what was in use, and what to change, instead of the allocator's words.

Knows the errors of a GPU's allocator, of PyTorch's on the CPU, and of Python. It calls no collective: the ranks that
had memory wait in one, and whoever watches over the run ends them.
"""

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sft_dist.config import RunConfig
from sft_dist.data.selection import Example
from sft_dist.errors import TrainingError

_GIB = 2**30
_CPU_ALLOCATOR = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


@contextmanager
def explained(what: str, *, rank: int, config: RunConfig, examples: Sequence[Example] | None = None) -> Iterator[None]:
    """Run what is inside; running out of memory there becomes a TrainingError that says what to change.

    `examples`: what this rank's forward is over, where it is over one.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error).splitlines() or [""])[0][:300]
        raise TrainingError(
            f"{what}: out of memory on rank {rank}{_shape(examples)}; {memory_in_use()}; to need less: "
            f"{'; '.join(remedies(config))} ({type(error).__name__}: {first_line})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_known or any(text in str(error) for text in _CPU_ALLOCATOR)


def remedies(config: RunConfig) -> list[str]:
    """Keys of the run file that lower what a rank needs, those first that change no gradient."""
    advice = []
    if config.batch.packs_per_micro_batch > 1:
        advice.append(f"batch.packs_per_micro_batch below {config.batch.packs_per_micro_batch}")
    if not config.model.gradient_checkpointing:
        advice.append("model.gradient_checkpointing: true")
    if config.batch.reduce_once is not False:
        advice.append("batch.reduce_once: false")
    if torch.cuda.is_available() and "offload" not in config.deepspeed:
        advice.append("deepspeed: zero3_offload_optimizer, or zero3_offload_all")
    advice.append("more ranks")
    advice.append(f"data.max_length below {config.data.max_length:,}, which leaves long conversations out")
    return advice


def memory_in_use() -> str:
    if torch.cuda.is_available():
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return (
            f"{held / _GIB:.2f} GiB allocated here ({peak / _GIB:.2f} at most), {free_bytes / _GIB:.2f} of "
            f"{total_bytes / _GIB:.2f} GiB of the device free"
        )
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (os.sysconf(name) * page / _GIB for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    capped = "" if limit == resource.RLIM_INFINITY else f", limited to {limit / _GIB:.2f} GiB of addresses (ulimit -v)"
    return (
        f"this process had {resident:.2f} GiB resident at most{capped}, {free:.2f} of {total:.2f} GiB of the host free"
    )


def _shape(examples: Sequence[Example] | None) -> str:
    if examples is None:
        return ""
    if not examples:
        return ", in a forward of no tokens"
    lengths = [len(example.sample.ids) for example in examples]
    longest = max(examples, key=lambda example: len(example.sample.ids))
    num_targets = sum(int((example.turns >= 0).sum()) for example in examples)
    return (
        f", in a forward of {sum(lengths):,} tokens of {len(examples):,} conversation(s) with {num_targets:,} targets; "
        f"the longest, {longest.sample.conversation_id}, has {max(lengths):,} tokens"
    )

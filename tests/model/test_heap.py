import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sft_dist.distributed.world import World
from sft_dist.model import heap
from sft_dist.model.engine import Engine

MIB = 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def step_of_an_engine() -> None:
    """A step in which DeepSpeed changes nothing."""
    of_deepspeed = SimpleNamespace(
        device="cpu", step=lambda: None, was_step_applied=lambda: True, get_global_grad_norm=lambda: 0.0
    )
    assert Engine(of_deepspeed, World(0, 1, 0, 1, "localhost", 1, "nothing")).step() == (True, 0.0)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
@pytest.mark.parametrize("give_back", [heap.trim, step_of_an_engine])
def test_memory_freed_between_blocks_in_use_goes_back_to_the_kernel(give_back: Callable[[], None]) -> None:
    torch.ones(30 * MIB // 4)  # freed at once: from now on glibc takes blocks up to this size from the heap
    blocks = [torch.ones(MIB // 4) for _ in range(256)]
    full = resident_bytes()
    kept = blocks[::8]
    del blocks
    give_back()
    assert full - resident_bytes() > 180 * MIB
    assert all(bool((block == 1).all()) for block in kept)

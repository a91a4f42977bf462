"""What opening a session does to the process: counted, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAULTS = """
import os, resource
from sft_dist.distributed.world import find_world
from sft_dist.session import open_session
open_session(find_world({}))
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(40_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
os._exit(0)
"""


def page_faults(**variables: str) -> int:
    env = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | variables
    done = subprocess.run(
        [sys.executable, "-c", FAULTS + "\n"],
        env=env | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.slow
def test_large_tensors_fault_in_huge_pages_unless_the_user_says_otherwise() -> None:
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    ours, asked_not_to = page_faults(), page_faults(THP_MEM_ALLOC_ENABLE="0")
    has_small_pages_by_default = modes.exists() and "[madvise]" in modes.read_text()
    # Elsewhere the kernel decides alone, and both are the same.
    assert ours < asked_not_to / 10 if has_small_pages_by_default else ours <= 1.1 * asked_not_to

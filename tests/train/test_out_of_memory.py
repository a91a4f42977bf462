"""Running out of memory is told as what did not fit and what to change; other errors stay what they are."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from sft_dist.config import ModelConfig, RunConfig
from sft_dist.data.sample import Sample
from sft_dist.data.selection import Example
from sft_dist.errors import ExitCode, TrainingError
from sft_dist.train import out_of_memory
from tests.helpers.worlds import ROOT

CONFIG = RunConfig(run_dir="x", model=ModelConfig(path="m", gradient_checkpointing=False))


def example(name: str, num_tokens: int, num_targets: int) -> Example:
    sample = Sample(name, 0, "s", np.zeros(num_tokens, np.int32), (), num_turns=1)
    turns = np.where(np.arange(num_tokens) < num_targets, 0, -1).astype(np.int32)
    return Example(sample, turns, (turns >= 0).astype(np.float32))


def test_a_real_allocation_that_fails_is_told_with_the_batch_and_the_remedies() -> None:
    examples = [example("short", 10, 3), example("long", 1500, 40)]
    with (
        pytest.raises(TrainingError) as caught,
        out_of_memory.explained("step 7, micro-batch 2", rank=3, config=CONFIG, examples=examples),
    ):
        torch.empty(2**50)
    message = str(caught.value)
    assert message.startswith("step 7, micro-batch 2: out of memory on rank 3, in a forward of 1,510 tokens")
    assert "2 conversation(s) with 43 targets; the longest, long, has 1,500 tokens" in message
    assert "GiB" in message and "model.gradient_checkpointing: true" in message and "data.max_length" in message
    assert "can't allocate memory" in message, "the allocator's own words stay"
    assert caught.value.exit_code == ExitCode.TRAINING


def test_errors_of_numpy_and_of_a_gpu_are_known() -> None:
    with pytest.raises(TrainingError, match="out of memory"), out_of_memory.explained("x", rank=0, config=CONFIG):
        np.empty(2**58)
    with pytest.raises(TrainingError, match="out of memory"), out_of_memory.explained("x", rank=0, config=CONFIG):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("memory"), OSError("no space")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, out_of_memory.explained("x", rank=0, config=CONFIG):
        raise error
    assert caught.value is error


_LIMITED = """
import resource, torch
from sft_dist.config import ModelConfig, RunConfig
from sft_dist.errors import TrainingError
from sft_dist.train import out_of_memory
layer = torch.nn.Linear(512, 512)
layer(torch.randn(8, 512)).sum().backward()  # threads and buffers exist before the limit
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28,) * 2)
config = RunConfig(run_dir="x", model=ModelConfig(path="m"))
rows = torch.randn(2**16, 512)
try:
    with out_of_memory.explained("step 1", rank=0, config=config):
        hidden = rows
        for _ in range(64):
            hidden = layer(hidden)
        hidden.sum().backward()
except TrainingError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_limit_of_the_address_space_is_run_into_and_named() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.startswith("step 1: out of memory on rank 0; this process had"), done.stdout + done.stderr
    assert "ulimit -v" in done.stdout

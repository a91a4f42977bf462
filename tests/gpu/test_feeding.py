"""The feed and the clock of phases on a real GPU: what is copied is whole, and the host waits for nothing."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sft_dist.data.sample import Sample
from sft_dist.data.selection import Example
from sft_dist.model.batch import collate
from sft_dist.model.cost import find_peak
from sft_dist.train.feeding import Feed, MicroBatch
from sft_dist.train.meter import PhaseClock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def micro_batches(num: int, length: int) -> Iterator[MicroBatch]:
    for number in range(num):
        ids = np.random.default_rng(number).integers(0, 1_000, length).astype(np.int32)
        turns = np.where(np.arange(length) % 2, 0, -1).astype(np.int32)
        sample = Sample("c", 0, "made", ids, (), num_turns=1)
        examples = (Example(sample, turns, (turns >= 0).astype(np.float32)),)
        yield MicroBatch(number, 0, True, examples, collate(examples))


def test_every_batch_arrives_whole_however_far_the_gpu_lags() -> None:
    """The GPU is kept busy, so that memory of the side stream would be used again too early if nothing prevented it."""
    device = torch.device("cuda", 0)
    heavy = torch.randn(4_096, 4_096, device=device)
    sums = []
    with Feed(micro_batches(50, 100_000), device, ahead=4) as feed:
        for step in range(50):
            for micro_batch in feed.step(step):
                heavy = (heavy @ heavy).clamp(-1, 1)
                assert micro_batch.batch.input_ids.is_cuda
                sums.append(micro_batch.batch.input_ids.sum())
    expected = [int(made.batch.input_ids.sum()) for made in micro_batches(50, 100_000)]
    assert [int(value) for value in sums] == expected


def test_taking_a_batch_and_marking_phases_waits_for_nothing() -> None:
    device = torch.device("cuda", 0)
    clock = PhaseClock(device)
    with Feed(micro_batches(6, 1_000), device, ahead=2) as feed:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(6):
                clock.begin(step)
                clock.enter("data")
                for micro_batch in feed.step(step):
                    clock.enter("forward")
                    micro_batch.batch.to(device)
                clock.finished()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    clock.end()
    torch.cuda.synchronize()
    times = clock.finished()
    assert times and times[-1].step == 5 and all(sum(t.seconds.values()) > 0 for t in times)


def test_phases_say_what_the_gpu_did_and_not_when_the_host_queued_it() -> None:
    device = torch.device("cuda", 0)
    matrix = torch.randn(8_192, 8_192, device=device, dtype=torch.bfloat16)
    clock = PhaseClock(device)
    for step in range(2):
        clock.begin(step)
        clock.enter("forward")
        for _ in range(20):
            matrix = (matrix @ matrix).clamp(-1, 1)
        clock.enter("backward")
    clock.end()
    torch.cuda.synchronize()
    for times in clock.finished():
        assert times.shares["forward"] > 0.9


def test_a_known_gpu_is_measured_by_its_data_sheet() -> None:
    assert find_peak(torch.device("cuda", 0), torch.bfloat16).flops_per_s > 1e13

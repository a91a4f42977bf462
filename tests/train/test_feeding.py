"""Micro-batches made ahead are those of the plan, in its order; their thread leaves nothing behind."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_dist.data.plan import Plan
from sft_dist.data.sample import Sample, Span
from sft_dist.data.selection import Selection
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import DataError
from sft_dist.model.batch import collate
from sft_dist.train.feeding import Feed, MicroBatch, micro_batches
from tests.helpers.samples import select

CPU = torch.device("cpu")
PATIENCE_S = 20.0


def world(rank: int = 0, size: int = 1) -> World:
    return find_world({"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})


def make(folder: Path, *, global_packs: int = 3) -> tuple[Selection, Plan]:
    """17 samples of 3 to 19 tokens, half of each a target, in packs of 24."""
    rng = np.random.default_rng(5)
    samples = []
    for number in range(17):
        length = int(rng.integers(3, 20))
        half = length // 2
        span = Span(1, "assistant", half, half, length, length, is_owned=True, turn=1, train=None, weight=1.0)
        ids = rng.integers(0, 300, length).astype(np.int32)
        samples.append(Sample(f"c{number}", number, "made", ids, (span,), num_turns=1))
    selection = select(folder, samples, max_length=24)
    plan = Plan(selection.lengths, selection.num_targets, max_length=24, global_packs=global_packs, seed=1, epochs=2)
    return selection, plan


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


def numbered(numbers: Iterator[int]) -> Iterator[MicroBatch]:
    """Steps of one empty micro-batch each."""
    for number in numbers:
        yield MicroBatch(number, 0, True, (), collate(()))


@pytest.mark.parametrize(("rank", "size", "per_forward"), [(0, 1, 1), (1, 2, 1), (2, 3, 2)])
def test_what_is_fed_is_what_the_plan_says(tmp_path: Path, rank: int, size: int, per_forward: int) -> None:
    """From a step in the middle, over the end of an epoch, with empty forwards where ranks do not divide the packs."""
    selection, plan = make(tmp_path)
    steps = range(1, plan.num_steps)
    source = micro_batches(selection, plan, steps, world(rank, size), per_forward)
    num_empty = 0
    with Feed(source, CPU, ahead=2) as feed:
        for step in steps:
            expected = plan.micro_batches(step, data_rank=rank, data_size=size, packs_per_micro_batch=per_forward)
            found = list(feed.step(step))
            assert [(m.step, m.number) for m in found] == [(step, number) for number in range(len(expected))]
            assert [m.is_last for m in found] == [False] * (len(expected) - 1) + [True]
            for made, pack in zip(found, expected, strict=True):
                ids = [e.sample.ids for e in made.examples]
                assert [e.sample.conversation_id for e in made.examples] == [
                    selection[index].sample.conversation_id for index in pack
                ]
                row = np.concatenate(ids) if pack else np.zeros(2)
                assert made.batch.input_ids[0].tolist() == row.tolist()
                num_empty += not pack
    assert num_empty > 0 or size == 1
    assert not feed_threads()


def test_no_more_is_made_than_there_is_room_for() -> None:
    """Three before anything was taken, and one more for each that was."""
    asked = [threading.Event() for _ in range(8)]

    def source() -> Iterator[int]:
        for number, event in enumerate(asked):
            event.set()
            yield number

    with Feed(numbered(source()), CPU, ahead=3) as feed:
        assert asked[2].wait(PATIENCE_S)
        assert not asked[3].wait(0.3)
        for step in (0, 1):
            assert [m.step for m in feed.step(step)] == [step]
        assert asked[4].wait(PATIENCE_S)
        assert not asked[5].wait(0.3)


def test_the_next_is_made_while_one_is_used() -> None:
    made = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        yield 1
        made.set()
        yield 2

    with Feed(numbered(source()), CPU, ahead=2) as feed:
        for _ in feed.step(0):
            assert made.wait(PATIENCE_S), "nobody asked for the second one"


def test_an_error_of_the_thread_is_raised_where_its_micro_batch_is_taken_and_again() -> None:
    def source() -> Iterator[int]:
        yield 0
        raise DataError("shard-00003.arrow: cannot be read")

    with Feed(numbered(source()), CPU, ahead=4) as feed:
        assert [m.step for m in feed.step(0)] == [0]
        for _ in range(2):
            with pytest.raises(DataError, match=r"shard-00003\.arrow: cannot be read"):
                next(feed.step(1))
    assert not feed_threads()


def test_asking_beyond_the_end_is_an_error_and_no_wait() -> None:
    with Feed(numbered(iter([0])), CPU, ahead=2) as feed:
        assert len(list(feed.step(0))) == 1
        with pytest.raises(IndexError, match="all micro-batches are taken"):
            next(feed.step(1))


def test_no_thread_is_left_after_an_exception_of_the_loop() -> None:
    """However full the room is when the loop leaves."""
    for taken in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt), Feed(numbered(iter(range(1_000))), CPU, ahead=1) as feed:
            for step in range(taken):
                list(feed.step(step))
            raise KeyboardInterrupt
        assert not feed_threads()


def test_the_thread_draws_no_random_numbers_of_the_loop(tmp_path: Path) -> None:
    selection, plan = make(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with Feed(micro_batches(selection, plan, range(plan.num_steps), world(), 1), CPU, ahead=100) as feed:
        for step in range(plan.num_steps):
            list(feed.step(step))
    assert torch.equal(torch.get_rng_state(), before)

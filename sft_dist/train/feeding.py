"""The micro-batches of a run, made one step ahead: a background thread reads, collates and copies them to the device.

In: a plan and prepared data. Out: `MicroBatch` values in the order of the plan, on the device. Nothing random happens
here: what a step draws (dropout, noise) follows from its position and is seeded by the loop, in its own thread.
"""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

import torch

from sft_dist import faults
from sft_dist.data.plan import Plan
from sft_dist.data.selection import Example, Selection
from sft_dist.distributed.world import World
from sft_dist.model.batch import Batch, collate


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward of this rank: its place in the run, what is in it, and the same as tensors."""

    step: int
    number: int  # within the step
    is_last: bool  # of the step
    examples: tuple[Example, ...]
    batch: Batch


def micro_batches(
    selection: Selection, plan: Plan, steps: Iterable[int], world: World, packs_per_micro_batch: int
) -> Iterator[MicroBatch]:
    """The forwards of this rank in these steps, each collated when it is asked for."""
    for step in steps:
        packs = plan.micro_batches(
            step, data_rank=world.rank, data_size=world.size, packs_per_micro_batch=packs_per_micro_batch
        )
        for number, pack in enumerate(packs):
            faults.reach("feed.before_collate", rank=world.rank, step=step + 1)
            examples = tuple(selection[index] for index in pack)
            yield MicroBatch(step, number, number == len(packs) - 1, examples, collate(examples))


class Feed:
    """Runs through micro-batches in a thread of its own, at most `ahead` of them before they are taken.

    A context manager: leaving it, for whatever reason, ends the thread. An error of the thread is raised where the
    micro-batch that it prevented is taken.
    """

    def __init__(self, source: Iterable[MicroBatch], device: torch.device, *, ahead: int) -> None:
        self._source = source
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._room = threading.Semaphore(ahead)
        self._made: SimpleQueue[tuple[MicroBatch, torch.cuda.Event | None] | BaseException] = SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True
        self._room.release()
        self._thread.join()

    def step(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of one step; steps are taken in the order of the source."""
        while True:
            micro_batch = self._take()
            assert micro_batch.step == step, f"step {micro_batch.step} was made, {step} is asked for"
            yield micro_batch
            if micro_batch.is_last:
                return

    def _take(self) -> MicroBatch:
        made = self._made.get()
        if isinstance(made, BaseException):
            self._made.put(made)  # whoever asks again is told again
            raise made
        self._room.release()
        micro_batch, copied = made
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            # Their memory belongs to the side stream: it may not be used again before this one has read them.
            for tensor in micro_batch.batch.tensors().values():
                tensor.record_stream(stream)
        return micro_batch

    def _run(self) -> None:
        try:
            if self._stream is not None:
                torch.cuda.set_device(self._device)  # the current device is one of each thread
            source = iter(self._source)
            while True:
                self._room.acquire()
                if self._is_closed:
                    return
                self._made.put(self._on_device(next(source)))
        except StopIteration:
            self._made.put(IndexError("all micro-batches are taken"))
        except BaseException as error:
            self._made.put(error)

    def _on_device(self, made: MicroBatch) -> tuple[MicroBatch, torch.cuda.Event | None]:
        if self._stream is None:
            return made, None
        with torch.cuda.stream(self._stream):
            batch = made.batch.pin_memory().to(self._device)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return MicroBatch(made.step, made.number, made.is_last, made.examples, batch), copied

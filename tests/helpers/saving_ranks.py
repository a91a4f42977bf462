"""Small real worlds that do nothing but save: gloo ranks forked from a server that has imported torch before.

A rank's state is a few float64 tensors that follow from the step by arithmetic, so that anybody can say what a resumed
run must end with.
"""

import os
import resource
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch

from sft_dist import faults
from sft_dist.config import CheckpointConfig, LoggingConfig
from sft_dist.distributed.world import World, start
from sft_dist.errors import UserError, say
from sft_dist.model.engine import Engine
from sft_dist.model.snapshot import Snapshot
from sft_dist.train import checkpoint, rundir
from sft_dist.train.checkpoint import TrainState
from sft_dist.train.lock import RunLock
from sft_dist.train.metrics import Metrics
from sft_dist.train.saver import Saver

NUM_STEPS = 6
NUM_VALUES = 50_000


@dataclass(frozen=True)
class Job:
    """What a world of two ranks does: NUM_STEPS steps with a checkpoint after every second one."""

    run_dir: Path
    asynchronous: bool = True
    faults: str = ""
    keep: int = 1
    step_s: float = 0.0
    largest_file: Mapping[int, int] = field(default_factory=dict)  # rank -> bytes it can write to one file
    claims_bytes: int = 0  # of a tensor that takes no memory, beside the others
    sees_late: Mapping[int, float] = field(default_factory=dict)  # rank -> seconds in which it sees no shard
    size: int = 2


@dataclass(frozen=True)
class Ended:
    """How a rank ended, what it said, and the step at which it was when it learnt that each checkpoint is published."""

    exit_code: int
    said: str
    published_at: dict[int, int]


class Stepping:
    """What Saver asks of an engine: this rank's files."""

    def __init__(self, rank: int, claims_bytes: int) -> None:
        self.weights = torch.full((NUM_VALUES,), float(rank), dtype=torch.float64)
        self.moments = torch.zeros(NUM_VALUES, dtype=torch.float64)
        self._rank = rank
        self._claimed = torch.zeros(1, dtype=torch.uint8).expand(claims_bytes)

    def step(self, number: int) -> None:
        """In place, as an optimizer does it."""
        self.moments.mul_(0.5).add_(number)
        self.weights.add_(self.moments)

    def capture(self) -> Snapshot:
        model = {"weights": self.weights} | ({"claimed": self._claimed} if len(self._claimed) else {})
        rank = self._rank
        return Snapshot({f"shards/rank_{rank}_model.pt": model, f"shards/rank_{rank}_optim.pt": [self.moments]})

    def checkpoint_bytes(self) -> int:
        return self.capture().num_bytes

    def load(self, folder: Path) -> None:
        shards = folder / "shards"
        self.weights.copy_(torch.load(shards / f"rank_{self._rank}_model.pt", weights_only=True)["weights"])
        self.moments.copy_(torch.load(shards / f"rank_{self._rank}_optim.pt", weights_only=True)[0])


def final_values(rank: int) -> tuple[float, float]:
    """Weight and moment of every element after all steps: the oracle."""
    weight, moment = float(rank), 0.0
    for number in range(NUM_STEPS):
        moment = moment * 0.5 + number
        weight += moment
    return weight, moment


def run(job: Job, timeout_s: float = 30) -> list[Ended]:
    """All ranks of a job, from its newest valid checkpoint on; a rank that outlives the timeout is killed: code -9."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.saving_ranks"])
    port = _free_port()
    folder = job.run_dir.parent / f"said-{time.monotonic_ns()}"
    folder.mkdir()
    ranks = [context.Process(target=_rank, args=(job, rank, port, folder)) for rank in range(job.size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    outlived = [process for process in ranks if process.is_alive()]
    for process in outlived:
        process.kill()
        process.join()
    said = [(folder / f"{rank}.txt").read_text() for rank in range(job.size)]
    assert not outlived, f"still running after {timeout_s} s:\n" + "\n".join(said)
    return [
        Ended(
            cast(int, process.exitcode),
            text,
            {int(a): int(b) for a, b in (line.split()[1:] for line in text.splitlines() if line.startswith("at "))},
        )
        for process, text in zip(ranks, said, strict=True)
    ]


def _rank(job: Job, rank: int, port: int, folder: Path) -> None:
    handle = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    os.environ[faults.VARIABLE] = job.faults
    if rank in job.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.largest_file[rank],) * 2)
    if rank in job.sees_late:
        _see_late(job.sees_late[rank])
    try:
        _work(job, World(rank, job.size, rank, job.size, "127.0.0.1", port, "torchrun-like"))
        code = 0
    except UserError as error:
        say(f"{type(error).__name__}: {error}")
        code = int(error.exit_code)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def _see_late(seconds: float) -> None:
    """As a client of a network file system whose cache of names lags behind."""
    names, until = os.listdir, time.monotonic() + seconds

    def listdir(path: Any) -> list[str]:
        return names(path) if time.monotonic() > until or Path(path).name != "shards" else []

    os.listdir = listdir  # type: ignore[assignment]


def _work(job: Job, world: World) -> None:
    lock = RunLock(job.run_dir) if world.is_main else None
    if lock is not None:
        rundir.take(lock)
    start(world, on_gpu=False, timeout_s=20)
    say_once = say if world.is_main else (lambda line: None)
    resumed = checkpoint.newest_valid(job.run_dir, world, say_once)
    engine, state = Stepping(world.rank, job.claims_bytes), TrainState()
    if resumed is not None:
        engine.load(resumed.folder)
        state = resumed.state
        say_once(f"resumed from step {state.step}")
    metrics = Metrics(job.run_dir, LoggingConfig(tensorboard=False), first_step=state.step, is_main=world.is_main)
    config = CheckpointConfig(keep=job.keep, asynchronous=job.asynchronous)
    saver = Saver(config, job.run_dir, world, cast(Engine, engine), state, metrics)
    told = saver.published_step

    def look(step: int) -> None:
        nonlocal told
        if saver.published_step != told:
            told = saver.published_step
            say(f"at {told} {step}")

    for number in range(state.step, NUM_STEPS):
        time.sleep(job.step_s)
        engine.step(number)
        state = TrainState(step=number + 1, heldout_best_step=(number + 1) // 2 * 2 or None, heldout_nll_best=0.0)
        saver.poll()
        look(number + 1)
        if state.step % 2 == 0:
            saver.begin(state, _facts(state.step), wait=state.step == NUM_STEPS)
            look(number + 1)
    saver.finish()
    if lock is not None:
        lock.release()


def _facts(step: int) -> dict[str, Any]:
    return {"of": step}


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

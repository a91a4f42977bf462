"""The checkpoints of a running training: one at a time on its way, written while training goes on."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft_dist import faults
from sft_dist.config import CheckpointConfig
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.errors import StorageError
from sft_dist.model.engine import Engine
from sft_dist.model.snapshot import HostMemory
from sft_dist.train import retention
from sft_dist.train.checkpoint import Checkpoint, TrainState, best_step, mark_best
from sft_dist.train.host_memory import available_bytes
from sft_dist.train.metrics import Metrics
from sft_dist.train.saving import Saved, Saving, Submit, at_once, no_room

_GIB = 2**30
_SHARE_OF_MEMORY = 0.5  # of what is available on the host, for the snapshots of all its ranks


class Saver:
    """Every method is called by all ranks at the same line.

    A checkpoint that is begun is published by a later call: `poll` after a step, `finish` before the next one and
    before the end. Raises StorageError, on all ranks at the same call, for one that could not be written.
    """

    def __init__(
        self, config: CheckpointConfig, run_dir: Path, world: World, engine: Engine, state: TrainState, metrics: Metrics
    ) -> None:
        self._config, self._run_dir, self._world, self._engine, self._metrics = config, run_dir, world, engine, metrics
        self._resumed = state.step or None
        self.begun_step = self._resumed  # of the newest checkpoint that is published or on its way
        self.published_step = self._resumed
        self._saving: Saving | None = None
        self._stall_s = 0.0
        self._memory = HostMemory()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._longest_s = 0.0
        self._num_bytes = engine.checkpoint_bytes()
        self._check_room()
        self._is_asynchronous = self._choose()

    def begin(self, state: TrainState, facts: dict[str, Any], *, protected: int = 0, wait: bool = False) -> None:
        """A checkpoint of the engine as it is now, once for every step.

        With `wait`, or if not asynchronous, it is published when this returns. That of step `protected`, if there is
        one, outlives it beside the best one and the one that was resumed from.
        """
        self.finish()
        if self.begun_step == state.step:
            return
        started = time.monotonic()
        faults.reach("save.snapshot", rank=self._world.rank, step=state.step)
        snapshot = self._engine.capture()
        submit: Submit = at_once
        if self._is_asynchronous and not wait:
            snapshot, submit = self._memory.copy(snapshot), self._thread.submit
        self._saving = Saving(
            self._run_dir, state, self._world, snapshot, facts, submit=submit,
            tidy=lambda published: self._tidy(published, state, protected),
        )  # fmt: skip
        self.begun_step = state.step
        self._stall_s = time.monotonic() - started
        if submit is at_once:
            self.finish()

    def poll(self) -> None:
        """Publish what all ranks have written by now; nothing without a checkpoint on its way."""
        self._advance(to_the_end=False)

    def finish(self) -> None:
        """Wait until the checkpoint on its way, if any, is published."""
        self._advance(to_the_end=True)

    @property
    def saving_s(self) -> float:
        """What saving may take if it is asked for now: as long as ever, twice while another one is on its way."""
        return self._longest_s * (1 if self._saving is None else 2)

    def _advance(self, *, to_the_end: bool) -> None:
        if self._saving is None:
            return
        started = time.monotonic()
        saved = self._saving.advance(to_the_end=to_the_end)
        self._stall_s += time.monotonic() - started
        if saved is not None:
            self._saving = None
            self.published_step = saved.checkpoint.step
            self._longest_s = max(self._longest_s, saved.seconds)
            self._tell(saved)

    def _tell(self, saved: Saved) -> None:
        step = saved.checkpoint.step
        for removal in saved.removed:
            if removal.problem is not None:
                self._metrics.say(f"the checkpoint of step {removal.step:,} cannot be removed: {removal.problem}")
            elif removal.step > step:
                self._metrics.say(
                    f"removed the checkpoint of step {removal.step:,}, of a continuation that was given up"
                )
        self._metrics.say(
            f"checkpoint {saved.checkpoint.folder} in {saved.seconds:.1f} s; training waited {self._stall_s:.2f} s"
        )
        self._metrics.record(
            "checkpoint", step, num_bytes=saved.checkpoint.num_bytes, save_s=saved.seconds, stall_s=self._stall_s
        )

    def _tidy(self, published: Checkpoint, state: TrainState, protected: int) -> list[retention.Removal]:
        """What fails here is said: published it is all the same, and the next checkpoint tries again."""
        best = state.heldout_best_step if self._config.keep_best else None
        keep_gib = self._config.keep_gib
        try:
            # First, so that best.json never names what is removed; on a full disk the one it names stays for now.
            problem = self._mark(state, best)
            named = None if problem is None else best_step(self._run_dir)
            removed = retention.evict(
                self._run_dir,
                published=published.step,
                keep=self._config.keep,
                keep_bytes=None if keep_gib is None else int(keep_gib * _GIB),
                protected={step for step in (best, named, self._resumed, protected) if step is not None},
            )
        except StorageError as error:
            self._metrics.say(f"warning: no checkpoint is removed: {error}")
            return []
        if problem is not None and (problem := self._mark(state, best)) is not None:
            self._metrics.say(f"warning: {problem}")
        return removed

    def _mark(self, state: TrainState, best: int | None) -> str | None:
        """What keeps best.json from being written, or None."""
        try:
            mark_best(self._run_dir, replace(state, heldout_best_step=best))
        except StorageError as error:
            return str(error)
        return None

    def _check_room(self) -> None:
        """Rather before the first step than after many."""
        num_bytes = sum(collectives.gather(self._num_bytes))
        problem = collectives.from_main(no_room(self._run_dir, num_bytes) if self._world.is_main else None)
        if problem is not None:
            raise StorageError(problem)

    def _choose(self) -> bool:
        if self._config.asynchronous != "auto":
            return self._config.asynchronous
        needed = self._num_bytes * self._world.local_size
        available = available_bytes()
        (short,) = collectives.all_max([float(needed > available * _SHARE_OF_MEMORY)])
        if short:
            self._metrics.say(
                f"checkpoints are written while training waits: a copy takes {needed / _GIB:,.1f} GiB of a host's "
                f"memory, {available / _GIB:,.1f} GiB are available (checkpoint.asynchronous)"
            )
        return not short

"""Writing a checkpoint: all ranks write below a temporary name, agree, then rank 0 publishes by one rename.

    agree: room on the disk ─► every rank: its files ─► agree ─► rank 0: manifest, rename, eviction ─► agree

What lies between two agreements is a task of this process alone. It may run in a thread while training goes on;
collectives are called by the main thread only, at the same line on every rank. A process that dies at any instant
leaves what was published before, and a temporary folder that the next holder of the run lock removes.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sft_dist import faults
from sft_dist.distributed import collectives
from sft_dist.distributed.preflight import nearest_existing
from sft_dist.distributed.world import World
from sft_dist.errors import StorageError, UserError
from sft_dist.model.snapshot import Snapshot, write_file
from sft_dist.paths import sync
from sft_dist.train import lock
from sft_dist.train.checkpoint import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    TrainState,
    checkpoints_dir,
    sealed,
    step_folder,
)
from sft_dist.train.files import write_json
from sft_dist.train.retention import Removal

T = TypeVar("T")
Submit = Callable[[Callable[[], Any]], "Future[Any]"]

_GIB = 2**30
_GRACE_S = 30.0  # for the writing of this rank when that of another has failed
_SPARE = 1.01  # names, shapes and the manifest beside the tensors


@dataclass(frozen=True, slots=True)
class Saved:
    checkpoint: Checkpoint
    seconds: float  # from the beginning to the agreement that it is published
    removed: tuple[Removal, ...]  # on rank 0: what the new one has made superfluous


def at_once(task: Callable[[], T]) -> "Future[T]":
    """Do a task here and now."""
    future: Future[T] = Future()
    try:
        future.set_result(task())
    except Exception as error:
        future.set_exception(error)
    return future


class Saving:
    """One checkpoint on its way. Its methods are collectives.

    `submit` does the tasks, at once or in a thread; `tidy` is called after the publish, on rank 0, in the same task.
    Raises StorageError on every rank when any rank could not write; the checkpoints from before stay as they are.
    """

    def __init__(
        self,
        run_dir: Path,
        state: TrainState,
        world: World,
        snapshot: Snapshot,
        facts: dict[str, Any],
        *,
        submit: Submit = at_once,
        tidy: Callable[[Checkpoint], Sequence[Removal]] = lambda published: (),
    ) -> None:
        self._run_dir, self._state, self._world, self._snapshot, self._facts = run_dir, state, world, snapshot, facts
        self._submit, self._tidy = submit, tidy
        self._began = time.monotonic()
        self._final = step_folder(run_dir, state.step)
        # A name of its own: a rank that has outlived another start must not write into this one.
        nonce = collectives.from_main(secrets.token_hex(4))
        self._temporary = self._final.with_name(f".tmp-{self._final.name}-{nonce}")
        self._manifest: dict[str, Any] = {}
        self._publishing: Future[Any] | None = None
        num_bytes = sum(collectives.gather(snapshot.num_bytes))
        problem = at_once(lambda: self._make_room(num_bytes)).exception() if world.is_main else None
        self._raise_together(problem, "begun")
        faults.reach("save.before_shards", rank=world.rank, step=state.step)
        self._writing = submit(self._write)

    def advance(self, *, to_the_end: bool) -> Saved | None:
        """Go on as far as all ranks have come, or wait for them; None while it is not published."""
        if self._publishing is None:
            if not self._agreed(self._writing, "written", to_the_end):
                return None
            self._manifest = sealed(
                {
                    "format": FORMAT,
                    "world_size": self._world.size,
                    "state": asdict(self._state),
                    "files": {name: file for part in collectives.gather(self._writing.result()) for name, file in part},
                    **self._facts,
                }
            )
            faults.reach("save.before_publish", rank=self._world.rank, step=self._state.step)
            self._publishing = self._submit(self._publish) if self._world.is_main else at_once(tuple)
        if not self._agreed(self._publishing, "published", to_the_end):
            return None
        faults.reach("save.after_publish", rank=self._world.rank, step=self._state.step)
        removed = tuple(self._publishing.result())
        return Saved(Checkpoint(self._final, self._manifest), time.monotonic() - self._began, removed)

    def _make_room(self, num_bytes: int) -> None:
        problem = no_room(self._run_dir, num_bytes)
        if problem is not None:
            raise StorageError(problem)
        self._temporary.mkdir(parents=True)

    def _write(self) -> list[tuple[str, dict[str, Any]]]:
        rank, step = self._world.rank, self._state.step
        self._snapshot.wait()
        written = []
        for name, content in self._snapshot.files.items():
            path = self._temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append((name, write_file(path, content)))
            faults.reach("save.after_shard", rank=rank, step=step)
        faults.reach("save.after_shards", rank=rank, step=step)
        return written

    def _publish(self) -> Sequence[Removal]:
        """Rank 0: everything of the new checkpoint is on disk before its name is."""
        lock.check_held(self._run_dir)
        write_json(self._temporary / MANIFEST, self._manifest)
        for folder in {self._temporary / Path(name).parent for name in self._manifest["files"]}:
            sync(folder)
        faults.reach("save.before_rename", rank=0, step=self._state.step)
        replaced = self._temporary.with_name(f".tmp-replaced-{self._final.name}")
        if self._final.exists():
            # The same step once more, after a resume from an older one: the new one is as good.
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self._final, replaced)
        try:
            os.replace(self._temporary, self._final)
        except OSError:
            # A network file system may say so of a rename that it has made: what counts is what is there.
            if self._temporary.exists() or not (self._final / MANIFEST).exists():
                raise
        sync(self._final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return self._tidy(Checkpoint(self._final, self._manifest))

    def _agreed(self, task: "Future[Any]", what: str, to_the_end: bool) -> bool:
        """Whether all ranks have done their task. Raises on all of them as soon as one has failed."""
        if to_the_end:
            wait([task])
        is_pending = not task.done()
        failed = not is_pending and task.exception() is not None
        pending, failures = collectives.all_max([float(is_pending), float(failed)])
        if failures:
            wait([task], timeout=_GRACE_S)  # what still writes would hold up the removal
            self._raise_together(task.exception() if failed else None, what)
        return not pending

    def _raise_together(self, problem: BaseException | None, what: str) -> None:
        """Raise on every rank what the first one has met; a bug is raised as it is, where it happened."""
        if problem is not None and not isinstance(problem, (OSError, RuntimeError, MemoryError, UserError)):
            raise problem
        if isinstance(problem, UserError):
            told = f"{problem}"
        else:
            told = f"{type(problem).__name__}: {problem}"
        answers = collectives.gather(None if problem is None else (type(problem), told))
        if any(answers) and self._world.is_main:
            shutil.rmtree(self._temporary, ignore_errors=True)  # its space is wanted, by outcome.json at least
        for rank, answer in enumerate(answers):
            if answer is not None:
                kind = answer[0] if issubclass(answer[0], UserError) else StorageError
                raise kind(
                    f"the checkpoint of step {self._state.step:,} cannot be {what} on rank {rank}: {answer[1]}"
                ) from problem


def save(run_dir: Path, state: TrainState, world: World, snapshot: Snapshot, facts: dict[str, Any]) -> Checkpoint:
    """Write and publish a checkpoint while the caller waits. A collective."""
    saved = Saving(run_dir, state, world, snapshot, facts).advance(to_the_end=True)
    assert saved is not None
    return saved.checkpoint


def no_room(run_dir: Path, num_bytes: int) -> str | None:
    """What is to be said when a checkpoint of num_bytes does not fit on the disk; quotas are met only by writing."""
    free, needed = shutil.disk_usage(nearest_existing(checkpoints_dir(run_dir))).free, int(num_bytes * _SPARE)
    if needed <= free:
        return None
    return (
        f"{run_dir}: a checkpoint needs {needed / _GIB:,.2f} GiB, {free / _GIB:,.2f} GiB are free; what is there stays "
        "as it is: make room, or let checkpoint.keep and checkpoint.keep_gib keep less"
    )

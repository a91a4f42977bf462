"""Whether the files of a checkpoint are those of its manifest: every byte is read, by all ranks together."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.errors import StorageError

LATE_S = 60.0  # after so long a file that another rank sees and this one does not is missing
_SAY_EVERY_S = 10.0
_CHUNK = 8 * 2**20
_MAX_THREADS = 8
_GIB = 2**30


def fault_of_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], world: World | None, say: Callable[[str], None]
) -> str | None:
    """The first fault among the files {name: {"num_bytes", "sha256"}}, or None. A collective, unless world is None.

    The files are dealt to the ranks by size. Hashing lets other threads run, so each rank uses its share of the cores.
    Raises Unreadable, on all ranks, where the disk does not give what is there.
    """
    late = _missing(folder, files) if world is None else _missing_everywhere(folder, files, world)
    if late:
        return f"{folder / min(late)} is missing"
    rank, size, local_size = (0, 1, 1) if world is None else (world.rank, world.size, world.local_size)
    mine = sorted(files, key=lambda name: (-int(files[name]["num_bytes"]), name))[rank::size]
    progress = _Progress(folder, sum(int(files[name]["num_bytes"]) for name in mine), say)
    threads = max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // local_size, len(mine)))
    with ThreadPoolExecutor(threads) as pool:
        faults = list(pool.map(lambda name: _fault(folder / name, files[name], progress), mine))
    if world is not None:
        faults = [fault for of_rank in collectives.gather(faults) for fault in of_rank]
    unreadable = next((fault for fault in faults if isinstance(fault, Unreadable)), None)
    if unreadable is not None:
        raise unreadable
    return next((fault for fault in faults if isinstance(fault, str)), None)


def _missing(folder: Path, files: Mapping[str, Any]) -> set[str]:
    """Names that are not listed. A listing also refreshes what a client of a network file system has in its cache.

    Raises Unreadable where there is none.
    """
    there = set()
    for parent in {(folder / name).parent for name in files}:
        try:
            there |= {str((parent / name).relative_to(folder)) for name in os.listdir(parent)}
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise Unreadable(f"{parent} cannot be listed: {error.strerror}") from error
    return set(files) - there


def _missing_everywhere(folder: Path, files: Mapping[str, Any], world: World) -> set[str]:
    """Names that some rank cannot see. One that any rank does see is waited for: caches of clients lag."""
    missing = _missing_here(folder, files)
    views = _views(missing)
    if not any(views) or set.intersection(*views):
        return set.intersection(*views)
    deadline = time.monotonic() + LATE_S
    while missing and time.monotonic() < deadline:
        time.sleep(0.2)
        missing = _missing_here(folder, files)
    return set.union(*_views(missing))


def _missing_here(folder: Path, files: Mapping[str, Any]) -> "set[str] | Unreadable":
    try:
        return _missing(folder, files)
    except Unreadable as error:
        return error


def _views(missing: "set[str] | Unreadable") -> list[set[str]]:
    """What every rank misses. Raises Unreadable on all where one could not look."""
    views = []
    for view in collectives.gather(missing):
        if isinstance(view, Unreadable):
            raise view
        views.append(view)
    return views


class Unreadable(StorageError):
    """Of a file that is there: the disk, or the way to it, is at fault; what the file holds is not known."""


class _Progress:
    """Says now and then how far the checking has come."""

    def __init__(self, folder: Path, num_bytes: int, say: Callable[[str], None]) -> None:
        self._folder, self._total, self._say = folder, num_bytes, say
        self._done = 0
        self._said = time.monotonic()
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if time.monotonic() - self._said < _SAY_EVERY_S:
                return
            self._said = time.monotonic()
        self._say(f"checking {self._folder}: {self._done / self._total:.0%} of {self._total / _GIB:,.1f} GiB")


def _fault(path: Path, expected: Mapping[str, Any], progress: _Progress) -> str | Unreadable | None:
    try:
        size = path.stat().st_size
        if size != expected["num_bytes"]:
            return f"{path} has {size:,} bytes, expected {expected['num_bytes']:,}"
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                progress.add(len(chunk))
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return Unreadable(
            f"{path} cannot be read: {error.strerror}; mend that and start again, or move {path.parent.parent} away to "
            "go on without it"
        )
    return None if digest.hexdigest() == expected["sha256"] else f"{path} is damaged: its sha256 is not the manifest's"

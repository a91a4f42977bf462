"""Which checkpoints stay. Called by rank 0 after a publish, or by the holder of the run lock."""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sft_dist import faults
from sft_dist.train.checkpoint import MANIFEST, checkpoints_dir, step_folders


@dataclass(frozen=True, slots=True)
class Removal:
    step: int
    problem: str | None  # why the folder could not be removed; it is no checkpoint any more, or is left as it was


def retained(
    num_bytes: Mapping[int, int], *, published: int, keep: int, keep_bytes: int | None, protected: Collection[int]
) -> set[int]:
    """Of the steps {step: bytes on disk}, those that stay after `published` has been published.

    The published one is the last valid one: it stays whatever it takes, and so do the protected (the best, the one
    that was resumed from). Of the others, the newest stay, up to `keep` with the published one, as long as all that
    stays takes at most `keep_bytes`. Steps beyond the published one are of a continuation that was given up (damaged,
    or left behind by a resume from an older one): the next resume would take them, so they go.
    """
    stays = {step for step in num_bytes if step == published or step in protected}
    total = sum(num_bytes[step] for step in stays)
    newest = sorted((step for step in num_bytes if step <= published), reverse=True)[:keep]
    for step in (step for step in newest if step not in stays):
        total += num_bytes[step]
        if keep_bytes is not None and total > keep_bytes:
            break
        stays.add(step)
    return stays


def evict(
    run_dir: Path, *, published: int, keep: int, keep_bytes: int | None = None, protected: Collection[int] = ()
) -> list[Removal]:
    """Remove what `retained` does not name. What cannot be removed is told and costs nothing but its space.

    Raises Unreadable, and removes nothing, where the folder cannot be listed.
    """
    folders = step_folders(run_dir)
    num_bytes = {step: _num_bytes(folder) for step, folder in folders.items()}
    stays = retained(num_bytes, published=published, keep=keep, keep_bytes=keep_bytes, protected=protected)
    return [_remove(step, folder, published) for step, folder in folders.items() if step not in stays]


def sweep_temporaries(run_dir: Path) -> None:
    """Remove what killed saves left behind; only the holder of the run lock may call this."""
    for folder in checkpoints_dir(run_dir).glob(".tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _remove(step: int, folder: Path, published: int) -> Removal:
    try:
        # Without its manifest a half-deleted folder is no checkpoint.
        (folder / MANIFEST).unlink(missing_ok=True)
        faults.reach("save.evict", rank=0, step=published)
        shutil.rmtree(folder)
    except OSError as error:
        return Removal(step, f"{error.strerror}: {error.filename}")
    return Removal(step, None)


def _num_bytes(folder: Path) -> int:
    return sum(_file_sizes(folder))


def _file_sizes(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # what cannot be measured takes no room
                yield os.lstat(os.path.join(parent, name)).st_size

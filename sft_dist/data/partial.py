"""A prepared data set in the making: finished chunks in one folder that any number of processes share.

    KEY.partial/data/shard-00012.arrow    samples of chunk 12, becomes KEY/shard-00012.arrow
    KEY.partial/chunk-00012.json          what was counted and refused; the chunk is done when this and the shard fit
    KEY.partial/failed-ATTEMPT.json       why a process of an attempt gave up, for its peers
    KEY.partial/alive-*                   touched by processes at work

Every file is written under a name of its own, synced and renamed. Names and bytes follow from the content alone, so
processes, and unrelated runs, that make the same chunk do no harm to each other.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sft_dist import errors
from sft_dist.data import store
from sft_dist.data.sample import Sample
from sft_dist.data.store import Refused, Shard
from sft_dist.errors import ClusterError, StorageError, UserError
from sft_dist.paths import sync

_CHUNK = re.compile(r"chunk-([0-9]{5,18})\.json")


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one source. Records are what was read, samples what came of those not refused."""

    num_records: int = 0
    num_refused: int = 0
    num_samples: int = 0
    num_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.num_records + other.num_records,
            self.num_refused + other.num_refused,
            self.num_samples + other.num_samples,
            self.num_tokens + other.num_tokens,
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished chunk adds to the manifest. `shard` is None where all its records were refused."""

    shard: Shard | None
    by_source: dict[str, Counts]
    num_split: int  # conversations in several samples
    stop_ids: tuple[int, ...]
    refused: tuple[Refused, ...]

    @property
    def total(self) -> Counts:
        return sum(self.by_source.values(), Counts())


class Partial:
    def __init__(self, folder: Path) -> None:
        """`folder` is the one that this becomes."""
        self.folder = folder
        self.path = folder.with_name(folder.name + ".partial")
        self._data = self.path / "data"
        self._me = secrets.token_hex(8)
        self._done: dict[int, Counts] = {}
        self._failure = self.path / "failed"
        self._failed_before: int | None = None

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]

    def open(self, attempt: int) -> None:
        """Raises OSError where the folder cannot be made."""
        self._data.mkdir(parents=True, exist_ok=True)
        self._failure = self.path / f"failed-{attempt:08x}.json"
        self._failed_before = self._failed_at()
        self.touch()

    @property
    def is_finished(self) -> bool:
        return (self.folder / store.MANIFEST).exists()

    def publish(self, number: int, samples: Sequence[Sample], summary: Summary) -> None:
        """Make chunk `number` visible to all. Raises OSError."""
        if samples:
            scratch = self._scratch(number)
            shard = store.write_shard(scratch, samples)
            self._publish(scratch, self._data / shard_name(number))
            summary = replace(summary, shard=replace(shard, file=shard_name(number)))
        self._write_json(self._chunk(number), asdict(summary))

    def summary(self, number: int) -> Summary | None:
        """None unless the chunk is complete: files that a crash cut short, or that are not ours, do not count."""
        try:
            summary = _summary(json.loads(self._chunk(number).read_bytes()))
            shard = summary.shard
            if shard is not None and (self._data / shard.file).stat().st_size != shard.num_bytes:
                return None
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return summary

    def counts(self, number: int) -> Counts | None:
        """Of a complete chunk; asks the file system only until it is."""
        if number not in self._done:
            summary = self.summary(number)
            if summary is None:
                return None
            self._done[number] = summary.total
        return self._done[number]

    def finished(self) -> list[Counts]:
        """Of all complete chunks, whoever made them."""
        with suppress(FileNotFoundError):
            names = [_CHUNK.fullmatch(entry.name) for entry in os.scandir(self.path)]
            found = [self.counts(int(name[1])) for name in names if name is not None]
            return [counts for counts in found if counts is not None]
        return []

    def missing(self, num_chunks: int) -> list[int]:
        self.finished()
        return [number for number in range(num_chunks) if number not in self._done]

    def forget(self) -> None:
        """Look at every chunk anew."""
        self._done = {}

    def finish(self, manifest: dict[str, Any], refused: Sequence[Refused]) -> None:
        """Write what makes the data a prepared data set and give it its name. Others may do the same meanwhile."""
        scratch = self._scratch(0)
        store.write_refused(scratch, refused)
        self._publish(scratch, self._data / store.REFUSED)
        store.write_manifest(scratch, manifest)
        self._publish(scratch, self._data / store.MANIFEST)
        try:
            sync(self._data)
            os.rename(self._data, self.folder)
            sync(self.folder.parent)
        except OSError:
            if not self.is_finished:
                if self.folder.exists():
                    raise StorageError(
                        f"{self.folder}: has no {store.MANIFEST}; delete this folder and prepare again"
                    ) from None
                raise

    def shard_paths(self, summaries: Sequence[Summary]) -> list[Path]:
        return [self._data / summary.shard.file for summary in summaries if summary.shard is not None]

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def forget_chunks(self) -> None:
        """Of data that is not what the key says."""
        for path in self.path.glob("chunk-*"):
            path.unlink(missing_ok=True)

    def is_used_by_others(self, within_s: float) -> bool:
        """Whether another process has shown itself lately, by the clock of the file system."""
        self.touch()
        with suppress(OSError):
            seen = {file.name: file.stat().st_mtime for file in self.path.glob("alive-*")}
            now = seen.pop(f"alive-{self._me}")
            return any(now - at < within_s for at in seen.values())
        return False

    def touch(self) -> None:
        """Show the others that this process is at work."""
        with suppress(OSError):
            (self.path / f"alive-{self._me}").touch()

    def pulse(self) -> object:
        """A value that changes whenever any process is at work."""
        with suppress(OSError):
            return {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(self.path) if "alive-" in entry.name}
        return None

    def write_failure(self, rank: int, error: BaseException) -> None:
        """Tell the others of this attempt, unless one of them has told us."""
        if self._failed_at() == self._failed_before:
            tree = {"kind": type(error).__name__, "message": str(error), "rank": rank}
            with suppress(OSError):
                self._write_json(self._failure, tree)

    def raise_failure(self) -> None:
        """Raise what ended another process of this attempt; what was there at `open` ended an earlier one."""
        if self._failed_at() == self._failed_before:
            return
        try:
            tree = json.loads(self._failure.read_bytes())
        except FileNotFoundError:
            return  # another run has finished, and removed everything
        kind = getattr(errors, tree["kind"], None)
        if isinstance(kind, type) and issubclass(kind, UserError):
            raise kind(tree["message"])
        raise ClusterError(f"rank {tree['rank']} failed while preparing: {tree['kind']}: {tree['message']}")

    def _failed_at(self) -> int | None:
        with suppress(OSError):
            return self._failure.stat().st_mtime_ns
        return None

    def _chunk(self, number: int) -> Path:
        return self.path / f"chunk-{number:05d}.json"

    def _scratch(self, number: int) -> Path:
        self._data.mkdir(parents=True, exist_ok=True)  # another run may just have finished and removed it
        return self.path / f"scratch-{self._me}-{number}"

    def _publish(self, scratch: Path, path: Path) -> None:
        try:
            sync(scratch)
            os.replace(scratch, path)
        except FileNotFoundError:
            # Another run has finished the whole set; what we have made is in it.
            if not self.is_finished:
                raise

    def _write_json(self, path: Path, tree: Any) -> None:
        scratch = self._scratch(0)
        scratch.write_text(json.dumps(tree))
        self._publish(scratch, path)


def _summary(tree: Any) -> Summary:
    """What `publish` has written. Raises ValueError, LookupError, TypeError or AttributeError for anything else."""
    counts = {name: Counts(**counts) for name, counts in tree["by_source"].items()}
    numbers = [tree["num_split"], *tree["stop_ids"], *(n for count in counts.values() for n in asdict(count).values())]
    if set(map(type, numbers)) - {int}:
        raise ValueError("something else where numbers must be")
    return Summary(
        None if tree["shard"] is None else Shard(**tree["shard"]),
        counts,
        tree["num_split"],
        tuple(tree["stop_ids"]),
        tuple(Refused(**item) for item in tree["refused"]),
    )


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"

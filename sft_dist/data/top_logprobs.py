"""What θ̂ says at every target of the training data, as far as it is kept: k tokens, and the mass of all others.

    FOLDER/part-00002.ids        int32 [rows, k], little-endian as all files here
    FOLDER/part-00002.logprobs   float32 [rows, k + 1], the last of all other tokens together
    FOLDER/first.npy             int64 [num_examples], the row of each example's first target, -1 where it has none here
    FOLDER/manifest.json         what the data and the model were, rows of every part; the folder counts with it alone

Rows are numbered through all parts, those of an example lie together in one. Every rank writes a part of its own from
beginning to end, so nothing depends on how a shared file system merges pages; readers map the parts into memory.
float32, since rounding to 16 bits would move probabilities by as much as the mass of the others often is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sft_dist.errors import StorageError
from sft_dist.paths import sync

FORMAT = 1
MANIFEST = "manifest.json"
_FIRST = "first.npy"
_IDS, _LOGPROBS = np.dtype("<i4"), np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """At n targets of one example, in their order."""

    ids: NDArray[np.int32]  # [n, k], the likeliest first
    logprobs: NDArray[np.float32]  # [n, k + 1]


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank has written."""

    num_rows: int
    tail_mass: float  # Σ over its rows of the mass outside the k


def bytes_per_target(k: int) -> int:
    return k * _IDS.itemsize + (k + 1) * _LOGPROBS.itemsize


class PartWriter:
    """Part `number` of a folder in the making, row by row. A context manager. Raises OSError."""

    def __init__(self, folder: Path, number: int) -> None:
        self._files: list[BinaryIO] = [open(path, "wb") for path in _paths(folder, number)]  # noqa: SIM115 - a field
        self._num_rows, self._tail_mass = 0, 0.0

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def add(self, ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> None:
        """Rows [n, k] and [n, k + 1]."""
        for file, rows, dtype in zip(self._files, (ids, logprobs), (_IDS, _LOGPROBS), strict=True):
            file.write(np.ascontiguousarray(rows, dtype).tobytes())
        self._num_rows += len(ids)
        self._tail_mass += float(np.exp(logprobs[:, -1].astype(np.float64)).sum())

    def finish(self) -> Part:
        """What has been written, once it is on disk."""
        for file in self._files:
            file.flush()
            sync(Path(file.name))
        return Part(self._num_rows, self._tail_mass)


def seal(folder: Path, identity: Mapping[str, Any], k: int, parts: Sequence[Part], first: NDArray[np.int64]) -> None:
    """Make a folder with all its parts a whole one, before it gets its name. Raises OSError."""
    np.save(folder / _FIRST, first)
    tree = {"format": FORMAT, "identity": dict(identity), "k": k, "parts": [asdict(part) for part in parts]}
    (folder / MANIFEST).write_text(json.dumps(tree, indent=2))
    for name in (_FIRST, MANIFEST):
        sync(folder / name)
    sync(folder)


class TopTable:
    """A finished folder. Raises StorageError where it is not whole, or of another model or other data."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            tree = json.loads((folder / MANIFEST).read_text())
            if tree["format"] != FORMAT:
                raise ValueError(f"written in format {tree['format']}, this version reads {FORMAT}")
            self.k = int(tree["k"])
            parts = [Part(int(part["num_rows"]), float(part["tail_mass"])) for part in tree["parts"]]
            self._maps = [_mapped(folder, number, part.num_rows, self.k) for number, part in enumerate(parts)]
            self._first = np.load(folder / _FIRST, mmap_mode="r")
            theirs = dict(tree["identity"])
            if not parts:
                raise ValueError("it has no parts")
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise StorageError(f"{folder}: cannot be used ({error}); delete it, and it is made anew") from None
        differing = sorted(key for key in theirs.keys() | identity.keys() if theirs.get(key) != identity.get(key))
        if differing:
            raise StorageError(
                f"{folder}: of another model or other data than its name says ({', '.join(differing)}); delete it, and "
                "it is made anew"
            )
        self._ends = np.cumsum([part.num_rows for part in parts])
        self.num_rows = int(self._ends[-1])
        self.mean_tail_mass = sum(part.tail_mass for part in parts) / max(self.num_rows, 1)

    def rows(self, example: int, num_targets: int) -> TopLogprobs:
        """Of the targets of an example, not copied from the mapped files."""
        if not num_targets:  # of one with a label alone
            return TopLogprobs(np.zeros((0, self.k), np.int32), np.zeros((0, self.k + 1), np.float32))
        first = int(self._first[example])
        if first < 0:
            raise StorageError(f"{self.folder}: holds nothing of example {example:,}; delete it, and it is made anew")
        part = int(np.searchsorted(self._ends, first, side="right"))
        ids, logprobs = self._maps[part]
        start = first - int(self._ends[part]) + len(ids)
        return TopLogprobs(ids[start : start + num_targets], logprobs[start : start + num_targets])

    def as_dict(self) -> dict[str, float | int]:
        """For the record."""
        return {"k": self.k, "mean_tail_mass": self.mean_tail_mass, "num_targets": self.num_rows}


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"part-{number:05d}.ids", folder / f"part-{number:05d}.logprobs"


def _mapped(folder: Path, number: int, num_rows: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Raises ValueError where a file has another size than its rows take."""
    found: list[NDArray[Any]] = []
    for path, dtype, width in zip(_paths(folder, number), (_IDS, _LOGPROBS), (k, k + 1), strict=True):
        if (num_bytes := path.stat().st_size) != num_rows * width * dtype.itemsize:
            raise ValueError(f"{path.name} has {num_bytes:,} bytes, {num_rows * width * dtype.itemsize:,} are expected")
        shape = (num_rows, width)
        # Files without bytes cannot be mapped.
        found.append(np.asarray(np.memmap(path, dtype, "r", shape=shape)) if num_rows else np.zeros(shape, dtype))
    return found[0], found[1]

"""The prepared data set: Arrow shards and a manifest in one folder, memory-mapped, complete when the manifest exists.

Written by `write_shard` and `write_manifest`, read by `PreparedDataset`. The shards are ordinary Arrow streams that
`datasets.Dataset.from_file` opens too.
"""

import json
import os
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft_dist.data.conversation import ROLES
from sft_dist.data.sample import Int32, Sample, Span
from sft_dist.errors import DataError

FORMAT = 3
MANIFEST = "manifest.json"
REFUSED = "refused.jsonl"

_INTS = pa.list_(pa.int32())
_SPAN_INTS = ("message", "role", "start", "output_start", "output_end", "end", "is_owned", "turn", "train")
_UNMARKED = -1
SCHEMA = pa.schema(
    [
        ("conversation_id", pa.string()),
        ("index", pa.int64()),
        ("source", pa.string()),
        ("num_turns", pa.int32()),
        ("weight", pa.float32()),
        ("digest", pa.binary(16)),
        ("ids", _INTS),
        *[(f"span_{field}", _INTS) for field in _SPAN_INTS],
        ("span_weight", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, slots=True)
class Refused:
    """One record that was left out, and why."""

    where: str
    id: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Shard:
    file: str
    num_samples: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SpanTable:
    """All spans of a data set as columns; `sample` is the number of the sample each belongs to."""

    sample: NDArray[np.int64]
    message: Int32
    role: Int32  # place in ROLES
    start: Int32
    output_start: Int32
    output_end: Int32
    end: Int32
    is_owned: NDArray[np.bool_]
    turn: Int32
    train: Int32  # 1, 0, or -1 where the author marked nothing
    weight: NDArray[np.float64]


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write samples as one Arrow stream with one record batch. Same samples, same bytes."""
    rows = list(samples)
    columns: dict[str, list[Any]] = {
        "conversation_id": [sample.conversation_id for sample in rows],
        "index": [sample.index for sample in rows],
        "source": [sample.source for sample in rows],
        "num_turns": [sample.num_turns for sample in rows],
        "weight": [sample.weight for sample in rows],
        "digest": [sample.digest for sample in rows],
        "ids": [sample.ids for sample in rows],
        "span_weight": [[span.weight for span in sample.spans] for sample in rows],
    }
    spans = [[_span_ints(span) for span in sample.spans] for sample in rows]
    for place, field in enumerate(_SPAN_INTS):
        columns[f"span_{field}"] = [[span[place] for span in of_sample] for of_sample in spans]
    batch = pa.record_batch([pa.array(columns[f.name], type=f.type) for f in SCHEMA], schema=SCHEMA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    return Shard(path.name, len(rows), path.stat().st_size)


def _span_ints(span: Span) -> tuple[int, ...]:
    return (
        span.message,
        ROLES.index(span.role),
        span.start,
        span.output_start,
        span.output_end,
        span.end,
        int(span.is_owned),
        span.turn,
        _UNMARKED if span.train is None else int(span.train),
    )


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """The last file to be written: it makes the folder a prepared data set."""
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
    os.replace(temporary, folder / MANIFEST)


def write_refused(folder: Path, refused: Iterable[Refused]) -> None:
    # Details may quote broken text: it is spelled out then.
    with open(folder / REFUSED, "w", encoding="utf-8", errors="backslashreplace") as file:
        for item in refused:
            file.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")


class PreparedDataset:
    """Samples by number, memory-mapped; nothing is copied but what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        self._tables: list[pa.RecordBatch] = []
        first = [0]
        for shard in self.manifest["shards"]:
            path = folder / shard["file"]
            if not path.exists() or path.stat().st_size != shard["num_bytes"]:
                raise DataError(f"{path}: missing or of the wrong size; delete {folder} and prepare again")
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            self._tables.append(table.combine_chunks().to_batches()[0])
            first.append(first[-1] + shard["num_samples"])
        self._first = np.array(first)

    def part(self, first: int, end: int) -> "PreparedDataset":
        """Samples [first, end) as a data set of their own; nothing is copied, and only they are read."""
        part = copy(self)
        vars(part).pop("lengths", None)
        vars(part).pop("spans", None)
        bounds = pairwise(self._first.tolist())
        pieces = [
            table.slice(max(first, low) - low, min(end, high) - max(first, low))
            for table, (low, high) in zip(self._tables, bounds, strict=True)
            if low < end and first < high
        ]
        part._tables, part._first = pieces, np.cumsum([0, *map(len, pieces)])
        return part

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> Sample:
        table, row = self._row(number)
        columns = [_row_values(table, f"span_{field}", row).tolist() for field in (*_SPAN_INTS, "weight")]
        spans = tuple(
            Span(
                message,
                ROLES[role],
                start,
                output_start,
                output_end,
                end,
                is_owned=bool(owned),
                turn=turn,
                train=None if train == _UNMARKED else bool(train),
                weight=weight,
            )
            for message, role, start, output_start, output_end, end, owned, turn, train, weight in zip(
                *columns, strict=True
            )
        )
        scalars = {name: table.column(name)[row].as_py() for name in SCHEMA.names[:6]}
        return Sample(**scalars, ids=_row_values(table, "ids", row), spans=spans)

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [num_samples]: tokens of each sample."""
        parts = [np.diff(table.column("ids").offsets.to_numpy()) for table in self._tables]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    @cached_property
    def spans(self) -> SpanTable:
        """All spans as columns, for what is computed over the whole set."""
        columns = {name: self._flat(f"span_{name}") for name in (*_SPAN_INTS, "weight")}
        counts = [np.diff(table.column("span_role").offsets.to_numpy()) for table in self._tables]
        sample = np.repeat(np.arange(len(self)), np.concatenate(counts))
        columns["is_owned"] = columns["is_owned"].astype(bool)
        columns["weight"] = columns["weight"].astype(np.float64)
        return SpanTable(sample=sample, **columns)

    def column(self, name: str) -> NDArray[Any]:
        """[num_samples] of `index`, `num_turns`, `weight`, `source` or `digest` (the last two as objects)."""
        as_objects = name in ("source", "digest")
        parts = [table.column(name).to_numpy(zero_copy_only=not as_objects) for table in self._tables]
        return np.concatenate(parts)

    def _flat(self, name: str) -> NDArray[Any]:
        return np.concatenate([table.column(name).flatten().to_numpy() for table in self._tables])

    def _row(self, number: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._tables[shard], number - int(self._first[shard])


def _row_values(table: pa.RecordBatch, name: str, row: int) -> NDArray[Any]:
    column = table.column(name)
    offsets = column.offsets
    values: NDArray[Any] = column.values.to_numpy()[offsets[row].as_py() : offsets[row + 1].as_py()]
    return values

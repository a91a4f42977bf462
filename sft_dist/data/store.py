"""The prepared data set: Arrow shards and a manifest in one folder, memory-mapped, complete when the manifest exists.

Written by `write_shard` and `write_manifest`, read by `PreparedDataset`. The shards are ordinary Arrow streams that
`datasets.Dataset.from_file` opens too.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft_dist.data.conversation import ROLES
from sft_dist.data.sample import Int32, Sample, Span, TrainOn, target_turns
from sft_dist.errors import DataError

FORMAT = 2
MANIFEST = "manifest.json"
REFUSED = "refused.jsonl"

_INTS = pa.list_(pa.int32())
_SPAN_FIELDS = ("start", "output_start", "output_end", "end")
SCHEMA = pa.schema(
    [
        ("conversation_id", pa.string()),
        ("index", pa.int64()),
        ("source", pa.string()),
        ("ids", _INTS),
        ("span_message", _INTS),
        ("span_role", _INTS),
        *[(f"span_{field}", _INTS) for field in _SPAN_FIELDS],
        ("turns", _INTS),
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


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write samples as one Arrow stream with one record batch. Same samples, same bytes."""
    rows = list(samples)
    columns: dict[str, list[Any]] = {
        "conversation_id": [sample.conversation_id for sample in rows],
        "index": [sample.index for sample in rows],
        "source": [sample.source for sample in rows],
        "ids": [sample.ids for sample in rows],
        "span_message": [[span.message for span in sample.spans] for sample in rows],
        "span_role": [[ROLES.index(span.role) for span in sample.spans] for sample in rows],
        "turns": [list(sample.turns) for sample in rows],
    }
    for field in _SPAN_FIELDS:
        columns[f"span_{field}"] = [[getattr(span, field) for span in sample.spans] for sample in rows]
    batch = pa.record_batch([pa.array(columns[f.name], type=f.type) for f in SCHEMA], schema=SCHEMA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    return Shard(path.name, len(rows), path.stat().st_size)


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
            self._tables.append(table.combine_chunks().to_batches()[0] if len(table) else None)
            first.append(first[-1] + shard["num_samples"])
        self._first = np.array(first)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> Sample:
        table, row = self._row(number)
        columns = {name: _row_values(table, name, row) for name in SCHEMA.names[3:]}
        spans = tuple(
            Span(message, ROLES[role], start, output_start, output_end, end)
            for message, role, start, output_start, output_end, end in zip(
                *(
                    columns[f"span_{field}"].tolist()
                    for field in ("message", "role", "start", "output_start", "output_end", "end")
                ),
                strict=True,
            )
        )
        return Sample(
            conversation_id=table.column("conversation_id")[row].as_py(),
            index=table.column("index")[row].as_py(),
            source=table.column("source")[row].as_py(),
            ids=columns["ids"],
            spans=spans,
            turns=tuple(columns["turns"].tolist()),
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [num_samples]: tokens of each sample."""
        parts = [np.diff(table.column("ids").offsets.to_numpy()) for table in self._tables if table is not None]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def num_targets(self, train_on: TrainOn) -> NDArray[np.int64]:
        """int64 [num_samples]: target tokens of each sample under `train_on`."""
        return np.array([int((target_turns(sample, train_on) >= 0).sum()) for sample in self], np.int64)

    def _row(self, number: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._tables[shard], number - int(self._first[shard])


def _row_values(table: pa.RecordBatch, name: str, row: int) -> Int32:
    column = table.column(name)
    offsets = column.offsets
    values: Int32 = column.values.to_numpy()[offsets[row].as_py() : offsets[row + 1].as_py()]
    return values

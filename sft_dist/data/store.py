"""The prepared data set: Arrow shards and a manifest in one folder, memory-mapped, complete when the manifest exists.

Written by `write_shard` and `write_manifest`, read by `PreparedDataset`. The shards are ordinary Arrow streams that
`datasets.Dataset.from_file` opens too.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
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
from sft_dist.errors import StorageError
from sft_dist.paths import fault_of_name

FORMAT = 6
MANIFEST = "manifest.json"
REFUSED = "refused.jsonl"
# What every manifest says.
_FACTS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("num_records", "num_rendered", "num_samples", "num_split", "num_duplicates"), int),
    **dict.fromkeys(("sources", "stop_ids", "shards"), list),
    **dict.fromkeys(("formats", "num_refused"), dict),
    "template": (str, type(None)),
}

_AGAIN = "delete {} and prepare again"
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
        ("label", pa.string()),
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
    batch = _batch(list(samples))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    return Shard(path.name, len(batch), path.stat().st_size)


def _batch(rows: Sequence[Sample]) -> pa.RecordBatch:
    spans = [span for sample in rows for span in sample.spans]
    num_spans = [len(sample.spans) for sample in rows]
    span_ints = np.array([_span_ints(span) for span in spans], np.int32).reshape(len(spans), len(_SPAN_INTS))
    columns = {
        "conversation_id": _strings([sample.conversation_id for sample in rows]),
        "index": _flat(np.array([sample.index for sample in rows], np.int64), pa.int64()),
        "source": _strings([sample.source for sample in rows]),
        "num_turns": _flat(np.array([sample.num_turns for sample in rows], np.int32), pa.int32()),
        "weight": _flat(np.array([sample.weight for sample in rows], np.float32), pa.float32()),
        "digest": _flat(np.frombuffer(b"".join(sample.digest for sample in rows), "V16"), pa.binary(16)),
        "label": _strings([sample.label for sample in rows]),
        "ids": _lists(
            np.concatenate([np.zeros(0, np.int32), *(sample.ids for sample in rows)], dtype=np.int32),
            pa.int32(),
            [len(sample.ids) for sample in rows],
        ),
        "span_weight": _lists(np.array([span.weight for span in spans], np.float32), pa.float32(), num_spans),
    }
    for place, field in enumerate(_SPAN_INTS):
        columns[f"span_{field}"] = _lists(span_ints[:, place], pa.int32(), num_spans)
    return pa.record_batch([columns[field.name] for field in SCHEMA], schema=SCHEMA)


# Columns over numpy's memory, and back (`_numpy`): pa.array and to_numpy import pandas, half a second in every process.


def _flat(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _lists(values: NDArray[Any], kind: pa.DataType, lengths: Sequence[int]) -> pa.Array:
    buffers = [None, pa.py_buffer(_offsets(lengths))]
    return pa.Array.from_buffers(pa.list_(kind), len(lengths), buffers, children=[_flat(values, kind)])


def _strings(texts: Sequence[str]) -> pa.Array:
    encoded = [text.encode() for text in texts]
    buffers = [None, pa.py_buffer(_offsets([len(text) for text in encoded])), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def _offsets(lengths: Sequence[int]) -> Int32:
    ends = np.cumsum([0, *lengths], dtype=np.int64)
    assert ends[-1] <= np.iinfo(np.int32).max, "a shard is far smaller than 2**31"
    return ends.astype(np.int32)


def _numpy(column: pa.Array) -> NDArray[Any]:
    """The memory of a column of numbers or digests, without a copy."""
    kind = np.dtype("V16") if column.type == pa.binary(16) else np.dtype(column.type.to_pandas_dtype())
    if not len(column):
        return np.zeros(0, kind)
    return np.frombuffer(column.buffers()[1], kind)[column.offset : column.offset + len(column)]


def _list_offsets(column: pa.Array) -> Int32:
    return np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]


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


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    # Paths may be no Unicode: JSON can say them all the same.
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_refused(path: Path, refused: Iterable[Refused]) -> None:
    # Details may quote broken text: it is spelled out then.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for item in refused:
            file.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")


class PreparedDataset:
    """Samples by number, memory-mapped; nothing is copied but what is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises StorageError for a manifest or a shard that is not as it was written, as far as sizes tell."""
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self._tables: list[pa.RecordBatch] = []
        first = [0]
        for shard in _shards(self.manifest):
            if fault := fault_of_name(folder, shard.file):
                raise StorageError(f"{folder / MANIFEST}: {fault}: nothing outside of {folder} is read")
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.num_bytes:
                raise StorageError(f"{path}: missing or of the wrong size; {_AGAIN.format(folder)}")
            try:
                self._tables.append(_read(path))
            except (OSError, pa.ArrowException, StopIteration) as error:
                raise StorageError(f"{path}: cannot be read: {error}; {_AGAIN.format(folder)}") from None
            first.append(first[-1] + shard.num_samples)
        if not self._tables:  # all records were refused
            self._tables.append(_batch([]))
            first.append(0)
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
        scalars = {name: table.column(name)[row].as_py() for name in SCHEMA.names[:7]}
        return Sample(**scalars, ids=_row_values(table, "ids", row), spans=spans)

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [num_samples]: tokens of each sample."""
        parts = [np.diff(_list_offsets(table.column("ids"))) for table in self._tables]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    @cached_property
    def spans(self) -> SpanTable:
        """All spans as columns, for what is computed over the whole set."""
        columns = {name: self._flat(f"span_{name}") for name in (*_SPAN_INTS, "weight")}
        counts = [np.diff(_list_offsets(table.column("span_role"))) for table in self._tables]
        sample = np.repeat(np.arange(len(self)), np.concatenate(counts))
        columns["is_owned"] = columns["is_owned"].astype(bool)
        columns["weight"] = columns["weight"].astype(np.float64)
        return SpanTable(sample=sample, **columns)

    def column(self, name: str) -> NDArray[Any]:
        """[num_samples] of `index`, `num_turns`, `weight` or `digest` (16 bytes each)."""
        return np.concatenate([_numpy(table.column(name)) for table in self._tables])

    def sources(self) -> tuple[tuple[str, ...], Int32]:
        """Names of the sources as they come, and int32 [num_samples]: which of them each sample is from."""
        return self.texts("source")

    def texts(self, name: str) -> tuple[tuple[str, ...], Int32]:
        """Distinct values of `source` or `label` as they come, and int32 [num_samples]: which of them is whose."""
        places: dict[str, int] = {}
        codes = [np.zeros(0, np.int32)]
        for table in self._tables:
            encoded = table.column(name).dictionary_encode()
            of_table = [places.setdefault(text, len(places)) for text in encoded.dictionary.to_pylist()]
            codes.append(np.array(of_table, np.int32)[_numpy(encoded.indices)])
        return tuple(places), np.concatenate(codes)

    def _flat(self, name: str) -> NDArray[Any]:
        return np.concatenate([_numpy(table.column(name).flatten()) for table in self._tables])

    def _row(self, number: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._tables[shard], number - int(self._first[shard])


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"written in format {manifest['format']}, this version reads {FORMAT}")
        strange = [name for name, kind in _FACTS.items() if not isinstance(manifest[name], kind)]
        if strange:
            raise ValueError(f"{', '.join(strange)}: not of the right kind")
        _shards(manifest)
    except (OSError, ValueError, LookupError, TypeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise StorageError(f"{path}: not a readable manifest ({detail}); {_AGAIN.format(folder)}") from None
    return dict(manifest)


def _shards(manifest: dict[str, Any]) -> list[Shard]:
    return [Shard(**shard) for shard in manifest["shards"]]


def read_digests(path: Path) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """(digest, index of the conversation) of every sample of one shard."""
    table = _read(path)
    return _numpy(table.column("digest")), _numpy(table.column("index"))


def _read(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()


def _row_values(table: pa.RecordBatch, name: str, row: int) -> NDArray[Any]:
    column = table.column(name)
    offsets = _list_offsets(column)
    return _numpy(column.values)[offsets[row] : offsets[row + 1]]

"""From sources to records: which files a source stands for, which format its records have, and one Record per row.

`SourceReader` runs in one process and gives rows; `to_record` runs in the workers and gives records. Faults of a file
are DataErrors; faults of one record are RecordErrors, which the caller refuses or raises.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import get_args

from sft_dist.config import RecordFormat, SourceConfig
from sft_dist.data import readers, records
from sft_dist.data.conversation import Record, RecordError
from sft_dist.data.parsing import Payload, parse
from sft_dist.errors import DataError

# How many records may be of no known format before the source is taken for something else.
_ROWS_TO_TELL = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One record before it is parsed."""

    index: int
    source: str
    path: str
    place: str  # ":417" or "[3]"
    payload: Payload
    part: str = ""  # the file, where the source is a pattern
    format: RecordFormat = "auto"  # auto: told by the record's own fields

    @property
    def where(self) -> str:
        return self.path + self.place

    @property
    def default_id(self) -> str:
        """Does not depend on the folder, as the identity of the prepared data does not."""
        return "/".join(filter(None, (self.source, self.part))) + self.place


class SourceReader:
    """Iterate once over the rows of a source; `format` is known from the start, `fraction` of it is read so far.

    `first_index` numbers the rows through all sources. Raises DataError for a source that cannot be read, that holds no
    records, or whose format cannot be told.
    """

    def __init__(self, source: SourceConfig, first_index: int = 0) -> None:
        self.source = source
        self.fraction = 0.0
        rows = self._rows(first_index)
        head: list[Row] = []
        self.format: RecordFormat = source.format if source.format != "auto" else self._told_by(rows, head)
        self._tail = chain(head, rows)

    def __iter__(self) -> Iterator[Row]:
        for row in self._tail:
            yield replace(row, format=self.format)

    def _rows(self, first_index: int) -> Iterator[Row]:
        name, index = source_name(self.source), first_index
        files = readers.expand(self.source.path)
        sizes = [max(1, Path(path).stat().st_size) if part else 1 for path, part in files]
        for number, (path, part) in enumerate(files):
            reader = readers.RecordReader(path)
            before, after = sum(sizes[:number]) / sum(sizes), sum(sizes[: number + 1]) / sum(sizes)
            for place, payload in reader:
                self.fraction = before + (after - before) * reader.fraction
                yield Row(index, name, path, place, payload, part)
                index += 1
            self.fraction = after

    def _told_by(self, rows: Iterator[Row], head: list[Row]) -> RecordFormat:
        """The format of the first record that has one; rows that were read for it are put into `head`."""
        problem = "it holds no records"
        for row in rows:
            head.append(row)
            try:
                return records.format_of(parse(row.payload, row.path, row.place))
            except RecordError as error:
                problem = problem if len(head) > 1 else f"{row.where}: {error}"
            if len(head) == _ROWS_TO_TELL:
                break
        if head:
            formats = ", ".join(get_args(RecordFormat)[1:])
            problem = (
                f"none of the first {len(head)} record(s) is of a known format ({formats}); the first one:\n  {problem}"
            )
        raise DataError(f"{self.source.path}: {problem}")


def detect_format(source: SourceConfig) -> RecordFormat:
    """The format given for a source, or that of its first records. Raises DataError as SourceReader does."""
    return SourceReader(source).format


def read_rows(source: SourceConfig, first_index: int = 0) -> Iterator[Row]:
    """Yield the rows of one source in order; `first_index` numbers them through all sources."""
    yield from SourceReader(source, first_index)


def to_record(row: Row) -> Record:
    """Parse and convert one row. Raises RecordError for one that cannot be trained on."""
    try:
        fields = parse(row.payload, row.path, row.place)
        format = records.format_of(fields) if row.format == "auto" else row.format
        return records.convert(
            fields, format, index=row.index, source=row.source, where=row.where, default_id=row.default_id
        )
    except RecursionError:
        raise RecordError("nested too deeply", "objects and lists lie in each other by the hundreds") from None


def source_name(source: SourceConfig) -> str:
    """Name of a source in statistics: the one given, else the file name or pattern without suffixes, or the Hub id."""
    if source.name is not None:
        return source.name
    return source.path if readers.is_hub_id(source.path) else readers.without_suffix(Path(source.path).name)


def source_fingerprint(source: SourceConfig) -> str:
    """Identity of a source's content: of its bytes; for a pattern also of the names of its files."""
    files = readers.expand(source.path)
    if not files[0][1]:
        return readers.fingerprint(source.path)
    lines = [f"{part} {readers.fingerprint(path)}" for path, part in files]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def check_source(source: SourceConfig) -> None:
    """Raise DataError unless everything that the path stands for can be read, or has the form of a Hub id."""
    for path, _ in readers.expand(source.path):
        readers.check_readable(path)


def check_sources(sources: Sequence[SourceConfig]) -> None:
    """`check_source` for each, and no two of one name, by which statistics, weights and repeats are kept."""
    path_of: dict[str, str] = {}
    for source in sources:
        check_source(source)
        name = source_name(source)
        if name in path_of:
            raise DataError(
                f"{source.path}: its name {name!r} is also that of {path_of[name]}; set `name` for one of the two"
            )
        path_of[name] = source.path

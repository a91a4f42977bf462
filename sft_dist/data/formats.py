"""From sources to records: which files a source stands for, which format its records have, and one Record per row.

`SourceReader` runs in one process and gives rows; `to_record` runs in the workers and gives records. Faults of a file
are DataErrors; faults of one record are RecordErrors, which the caller refuses or raises.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

from sft_dist.config import RecordFormat, SourceConfig
from sft_dist.data import readers, records
from sft_dist.data.conversation import Record, RecordError
from sft_dist.data.parsing import Payload, parse
from sft_dist.errors import DataError

# How many records may be of no known format before the source is an error.
_ROWS_TO_TELL = 100
_MAX_READING_S = 20.0  # spent on finding lines in the files again
_ONLY_WILDCARDS = re.compile(r"([*?.]|\[[^]]*])*")


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


# Path, part, place and payload of one record: a row before its format is known.
_Place: TypeAlias = tuple[str, str, str, Payload]


class SourceReader:
    """Iterate once over the rows of a source; `format` is known from the start, `fraction` of it is read so far.

    `first_index` numbers the rows through all sources. Raises DataError for a source that cannot be read or whose
    format cannot be told.
    """

    def __init__(self, source: SourceConfig, first_index: int = 0) -> None:
        self.source = source
        self.fraction = 0.0
        self._first_index = first_index
        payloads = self._payloads()
        head: list[_Place] = []
        self.format: RecordFormat = source.format if source.format != "auto" else self._told_by(payloads, head)
        self._places = chain(head, payloads)

    def __iter__(self) -> Iterator[Row]:
        name = source_name(self.source)
        for index, (path, part, place, payload) in enumerate(self._places, start=self._first_index):
            yield Row(index, name, path, place, payload, part, self.format)

    def _payloads(self) -> Iterator[_Place]:
        files = readers.expand(self.source.path)
        sizes = [Path(path).stat().st_size if part else 1 for path, part in files]
        num_read, total = 0, sum(sizes)
        for (path, part), size in zip(files, sizes, strict=True):
            reader = readers.RecordReader(path, records.fields_read)
            for place, payload in reader:
                self.fraction = (num_read + size * reader.fraction) / total
                yield path, part, place, payload
            num_read += size
        self.fraction = 1.0

    def _told_by(self, payloads: Iterator[_Place], head: list[_Place]) -> RecordFormat:
        """The format of the first record that has one; what was read for it is put into `head`."""
        problem = ""
        for path, part, place, payload in islice(payloads, _ROWS_TO_TELL):
            head.append((path, part, place, payload))
            try:
                return records.format_of(parse(payload, path, place))
            except RecordError as error:
                problem = problem or f"{path}{place}: {error}"
        if not head:
            raise DataError(f"{self.source.path}: it holds no records")
        raise DataError(
            f"{self.source.path}: none of the first {len(head)} record(s) is of a known format "
            f"({', '.join(records.REQUIRED)}); the first one:\n  {problem}"
        )


def detect_format(source: SourceConfig) -> RecordFormat:
    """The format given for a source, or that of its first records. Raises DataError as SourceReader does."""
    return SourceReader(source).format


def read_rows(source: SourceConfig, first_index: int = 0) -> Iterator[Row]:
    """Yield the rows of one source in order; `first_index` numbers them through all sources."""
    yield from SourceReader(source, first_index)


def places(sources: Sequence[SourceConfig], indices: set[int]) -> dict[int, str]:
    """Number of a record through all sources -> file:line, by reading the files once more; what is not found is left
    out.
    """
    found: dict[int, str] = {}
    deadline = time.monotonic() + _MAX_READING_S
    first_index = 0
    try:
        for source in sources:
            if readers.is_hub_id(source.path):
                return found
            for row in read_rows(source, first_index):
                first_index = row.index + 1
                if row.index in indices:
                    found[row.index] = row.where
                if len(found) == len(indices) or time.monotonic() > deadline:
                    return found
    except (DataError, OSError):
        pass  # the files may have gone since they were prepared
    return found


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
    """Name of a source in statistics: the one given, else the file name without suffixes, or the Hub id.

    Of a pattern it is the last part that is more than wildcards: `logs/**/*.jsonl` is `logs`.
    """
    if source.name is not None:
        return source.name
    if readers.is_hub_id(source.path):
        return source.path
    names = [readers.without_suffix(part) for part in reversed(Path(source.path).absolute().parts[1:])]
    if readers.is_pattern(source.path):
        names = [name for name in names if not _ONLY_WILDCARDS.fullmatch(name)]
    return names[0] if names else source.path


def source_fingerprint(source: SourceConfig) -> str:
    """Identity of a source's content: of its bytes; for a pattern also of the names of its files."""
    files = readers.expand(source.path)
    if not files[0][1]:
        return readers.fingerprint(source.path)
    lines = [f"{part} {readers.fingerprint(path)}" for path, part in files]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def source_kind(source: SourceConfig) -> str:
    """How the source is read, as `readers.kind_of` names it; a pattern's files tell theirs in the fingerprint."""
    return readers.kind_of(readers.expand(source.path)[0][0])


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
